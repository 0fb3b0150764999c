"""What a step of one token keeps that is no history: states, and the last few positions."""

from __future__ import annotations

from compiler import spec
from compiler.errors import UserError
from compiler.ir import Program


def refuse_states(program: Program) -> None:
    """Decoding compiled ahead of time knows histories alone.

    Args:
        program: as elaborated, where equations stand as they were written.

    Raises:
        UserError: a state, or a history that is read at another token; the message shows where.
    """
    for _, body in spec.scopes(program):
        for node in body:
            if node.op in ("scan", "shift"):
                what = "a state" if node.op == "scan" else "a history that is read at another token"
                raise UserError(
                    f"{node.span}: this is {what}, which --optimize does not compile yet: without "
                    "it the model decodes through model.py"
                )
