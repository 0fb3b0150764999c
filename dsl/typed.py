"""The checked model: every name resolved, every summation explicit. What the compiler reads.

A block is checked for itself, with its own indices standing for whatever a use binds them to, and
once for each way its compile-time ``if`` conditions can turn out. Dims of values are ``Axis``es: an
index, a sum of indices (``n|j``), or a product. Two axes are the same only if they are the same
declaration: extents that happen to agree prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl.diagnostics import Span
from dsl.extents import Extent

if TYPE_CHECKING:
    from dsl.files import Unit
    from dsl.scope import ConstScope

# -- indices ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Index:
    """A declared index; identity is the declaration. ``formal`` ones are bound by a use.

    ``alias`` holds what an index like ``e = (g, m)`` stands for.
    """

    name: str
    extent: Extent
    kind: str = "plain"  # plain, time, history
    span: Span | None = None
    start: Extent = field(default_factory=lambda: Extent.of(0))
    formal: bool = False
    alias: Axis | None = None
    of: Index | None = None  # a history's time index

    def __str__(self) -> str:
        return self.name

    @property
    def size(self) -> Extent:
        return self.extent


@dataclass(frozen=True)
class Sum:
    """``n|j``: the rows of the parts stacked."""

    parts: tuple[Axis, ...]

    def __str__(self) -> str:
        return "|".join(map(str, self.parts))

    @property
    def size(self) -> Extent:
        return sum((p.size for p in self.parts), Extent.of(0))


@dataclass(frozen=True)
class Product:
    """``(h, n)``: row-major."""

    parts: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"({','.join(map(str, self.parts))})"

    @property
    def size(self) -> Extent:
        size = Extent.of(1)
        for part in self.parts:
            size = size * part.size
        return size


Axis = Index | Sum | Product


# -- expressions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expr:
    """``free``: the axes this expression still ranges over, in order of first occurrence.

    ``kind`` is number, bool or index (an index value ``of`` some index). ``constant``: known when
    the model is compiled, without axes.
    """

    span: Span
    free: tuple[Axis, ...]
    kind: str = "number"
    of: Index | None = None


@dataclass(frozen=True, kw_only=True)
class Scalar(Expr):
    """A compile-time constant expression; ``names`` are the local constants it may read."""

    value: ast.Expr
    scope: ConstScope  # what its names mean


# How one declared axis of a value is subscripted.


@dataclass(frozen=True)
class Take:
    """Along ``axis``; another index of provably equal extent than the declared one renames it."""

    axis: Axis


@dataclass(frozen=True)
class Part:
    """The rows of one part of a declared sum, itself subscripted."""

    part: Axis
    inner: Sub


@dataclass(frozen=True)
class Split:
    """A product (or an index of the product's extent) taken apart."""

    axes: tuple[Axis, ...]
    inner: tuple[Sub, ...]


@dataclass(frozen=True)
class At:
    """One fixed position."""

    value: ast.Expr
    scope: ConstScope


@dataclass(frozen=True)
class Pick:
    """Positions held by an index value."""

    value: Expr


@dataclass(frozen=True)
class Shift:
    """Along a history: the tokens ``offset + sign * index`` after ``time``, none of which is ahead.

    Without an ``index`` it is one token. ``offset`` counts the index from its first place.
    """

    time: Index
    index: Index | None
    sign: int
    offset: Extent
    span: Span


Sub = Take | Part | Split | At | Pick | Shift


@dataclass(frozen=True, kw_only=True)
class Value(Expr):
    """A named value, parameter or state, subscripted."""

    name: str
    role: str  # value, param, state; before: what a scan was at the token before
    axes: tuple[Axis, ...]  # as declared
    subscripts: tuple[Sub, ...]


@dataclass(frozen=True, kw_only=True)
class Iota(Expr):
    """An index used as a number."""

    index: Index


@dataclass(frozen=True, kw_only=True)
class Position(Expr):
    """Where in its sequence each token of ``time`` or ``history`` stands."""

    index: Index


@dataclass(frozen=True, kw_only=True)
class Map(Expr):
    """An elementwise function; dims are aligned by name."""

    fn: str
    args: tuple[Expr, ...]


@dataclass(frozen=True)
class Factor:
    value: Expr
    divides: bool = False


@dataclass(frozen=True, kw_only=True)
class Contraction(Expr):
    """A chain of ``*`` and ``/``, summed over ``over``."""

    factors: tuple[Factor, ...]
    over: tuple[Axis, ...]


@dataclass(frozen=True, kw_only=True)
class Reduce(Expr):
    fn: str  # sum, mean, max, min
    over: tuple[Axis, ...]
    arg: Expr


@dataclass(frozen=True, kw_only=True)
class Choice(Expr):
    """softmax, top, argtop, in_top over one axis (``parts`` if it is an alias of a product)."""

    fn: str
    over: Index
    to: Index | None
    count: ast.Expr | None
    scope: ConstScope
    arg: Expr


@dataclass(frozen=True, kw_only=True)
class Join(Expr):
    """``stack[o](a, b)`` along a new index, ``concat[n|j](a, b)`` along a sum."""

    fn: str
    axis: Axis
    args: tuple[Expr, ...]


@dataclass(frozen=True, kw_only=True)
class Broadcast(Expr):
    axes: tuple[Axis, ...]
    arg: Expr


@dataclass(frozen=True, kw_only=True)
class CallFn(Expr):
    """A function, inlined. ``bind`` maps its formal indices to the caller's axes."""

    fn: str
    target: tuple[ast.Fn, Unit]
    bind: tuple[tuple[Index, Axis], ...]
    args: tuple[Expr, ...]


@dataclass(frozen=True, kw_only=True)
class CallBlock(Expr):
    """A def of a used block (``use``), of one of an ``array`` (at ``pick``), or of this block."""

    use: str | None
    array: Index | None
    method: str
    pick: Expr | None
    args: tuple[Expr, ...]


@dataclass(frozen=True, kw_only=True)
class Chain(Expr):
    """``chain[a](layers, x)``: each block of the array in turn."""

    use: str
    index: Index
    args: tuple[Expr, ...]


def walk(e: Expr) -> Iterator[Expr]:
    """An expression and every one inside it, those in subscripts included."""
    stack: list[object] = [e]
    while stack:
        at = stack.pop()
        if isinstance(at, Expr):
            yield at
        if isinstance(at, (Expr, Factor, Part, Split, Pick)):
            stack += [getattr(at, f.name) for f in fields(at)]
        elif isinstance(at, tuple):
            stack += at


# -- blocks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Equation:
    """``name[written] = value``. ``axes`` are what readers see: for a block's result, as declared
    (``y[(p,o)]`` may define a result ``y[j]`` of the same extent)."""

    name: str
    kind: str  # plain, let, cached, scan
    written: tuple[Axis, ...]
    axes: tuple[Axis, ...]
    dtype: str | None
    value: Expr
    span: Span
    start: Expr | None = None  # of a scan: the value before the first token, which has no time

    def expressions(self) -> Iterator[Expr]:
        """Every expression in it."""
        for e in (self.value, self.start):
            if e is not None:
                yield from walk(e)


@dataclass(frozen=True)
class Formal:
    name: str
    axes: tuple[Axis, ...]
    of: Index | None
    span: Span
    shift_of: str | None = None
    shift: int = 0
    dtype: str = "act"  # that a caller gives: act or f32; positions have none


@dataclass(frozen=True)
class Def:
    name: str
    formals: tuple[Formal, ...]
    result: str
    result_axes: tuple[Axis, ...]
    result_of: Index | None
    equations: tuple[Equation, ...]
    constants: Mapping[str, ast.Expr]
    span: Span


@dataclass(frozen=True)
class Stored:
    """A parameter or state."""

    name: str
    axes: tuple[Axis, ...]
    dtype: str  # act, f32
    role: str
    span: Span


@dataclass(frozen=True)
class Use:
    name: str
    block: str
    target: tuple[ast.Block, Unit]  # the declaration and the file it stands in
    array: Index | None
    bind: tuple[Axis, ...]
    settings: Mapping[str, ast.Expr]
    span: Span


@dataclass(frozen=True)
class Block:
    """A block under one outcome of its conditions. ``formals`` are its indices in order."""

    name: str
    formals: tuple[Index, ...]
    settings: Mapping[str, ast.Expr]
    stored: tuple[Stored, ...]
    uses: tuple[Use, ...]
    defs: Mapping[str, Def]
    scope: ConstScope
    span: Span


@dataclass(frozen=True)
class Fn:
    name: str
    formals: tuple[Index, ...]
    definition: Def
    scope: ConstScope
    span: Span
