"""Two tensors of one name are refused. ``dslc check`` tells it first (``dsl/checkpoint_names.py``):
here are programs that come from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

from compiler.errors import UserError
from dsl.clashes import Named, clashes
from dsl.diagnostics import Span
from dsl.templates import TemplateError


class BadName(UserError):
    """A tensor's name in a checkpoint cannot be made."""


class NameClash(BadName):
    """Two different tensors of a program would have one name in a checkpoint."""


def check_names(found: Iterable[Named]) -> None:
    """No two tensors of one name.

    Raises:
        NameClash: two have one.
        BadName: a name has a number that is not whole or below zero.
    """
    known = list(found)
    for named in known:
        try:
            named.parts  # noqa: B018  made where it is first asked for
        except TemplateError as error:
            at = _places(named.said)
            raise BadName(f"the name of {named} in a checkpoint: {error}{at}") from None
    for clash in clashes(known):
        raise NameClash(f"{clash.message}{_places(clash.said)}")


def _places(spans: Iterable[Span]) -> str:
    lines = dict.fromkeys(str(span) for span in spans)
    return f" (named at {', '.join(lines)})" if lines else ""
