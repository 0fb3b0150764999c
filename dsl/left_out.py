"""What to do where a right side ranges over what the left side does not: hints."""

from __future__ import annotations

from dsl.scope import atoms
from dsl.typed import Axis, Expr, Index, Value


def left_out(
    value: Expr, extra: list[Axis], missing: list[Axis], wanted: tuple[Axis, ...], shown: str
) -> str:
    """The hint.

    Args:
        extra: what the left side lacks; missing: what the right side lacks.
        wanted: what the left side has; shown: as it stands in the text.
    """
    return _other_name(value, extra, missing) or _sum_or_keep(extra, wanted, shown)


def _other_name(value: Expr, extra: list[Axis], missing: list[Axis]) -> str:
    """The hint where the left side calls an axis by another name of the same extent."""
    if len(extra) != 1 or len(missing) != 1 or extra[0].size != missing[0].size:
        return ""
    here, there = extra[0], missing[0]
    said = f"'{here}' is called '{there}' where it is read: "
    if isinstance(value, Value):
        return f"{said}{value.name}[...] with {there} in its place"
    return f"{said}let whole[{here}] = ..., and then whole[{there}]"


def _sum_or_keep(extra: list[Axis], wanted: tuple[Axis, ...], shown: str) -> str:
    """What to do about indices that the left side lacks."""
    for index in (i for i in wanted if isinstance(i, Index) and i.alias is not None):
        assert index.alias is not None
        if any(set(atoms(axis)) <= set(atoms(index.alias)) for axis in extra):
            return f"'{index}' is {index.alias}: write {index.alias} on the left"
    for axis in extra:
        if isinstance(axis, Index) and axis.of in wanted:
            return (
                f"the right side is computed for the tokens of this step, which '{axis.of}' "
                f"runs over: write '{axis.of}' for '{axis}'"
            )
    names = ", ".join(map(str, extra))
    kept = f"{shown[:-1]},{names}]" if shown.endswith("]") else f"{shown}[{names}]"
    return f"sum over it: sum[{names}](...), or keep it on the left: {kept}"
