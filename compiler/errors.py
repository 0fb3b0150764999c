"""What the user can mend."""


class UserError(Exception):
    """A mistake outside of the source text: one clear message, which the command prints before it
    exits with status 1. Mistakes in the source are ``dsl.diagnostics.DiagnosticError``."""
