"""The syntax tree of a ``.arch`` file: what the grammar builds and the checker reads.

Nothing here knows what a name means. Every node has a span; expressions also know how deep they
are, so that no later stage recurses past what Python can bear.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsl.deploy.syntax import Deploy as Deploy
from dsl.deploy.syntax import Table as Table
from dsl.diagnostics import Span

MAX_DEPTH = 120  # nesting of expressions and of braces


@dataclass(frozen=True, eq=False)
class Name:
    text: str
    span: Span


# -- expressions -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Literal:
    """A number, a quoted text, ``true``, ``false``, ``inf`` or ``null`` (None)."""

    value: int | float | str | bool | None
    span: Span
    depth: int = 1


@dataclass(frozen=True, eq=False)
class Subscript:
    """One place in brackets: ``t``, ``n|j`` (several parts), ``(g,m)``, ``pick[k]``, ``m -> i``."""

    parts: tuple[Expr, ...]
    to: Name | None
    span: Span
    depth: int = 1


@dataclass(frozen=True, eq=False)
class Ref:
    """``x``, ``x[t,d]``, ``child.name``."""

    name: Name
    member: Name | None
    subscripts: tuple[Subscript, ...] | None
    span: Span
    depth: int = 1


@dataclass(frozen=True, eq=False)
class Call:
    """``f(x)``, ``rotary[j](x[j], at)``, ``sum[k](w[k])``, ``expert[pick[k]](x[d])``."""

    name: Name
    member: Name | None
    subscripts: tuple[Subscript, ...] | None
    arguments: tuple[Expr, ...]
    span: Span
    depth: int = 1


@dataclass(frozen=True, eq=False)
class Group:
    """Parentheses: one expression, or in subscripts a product of indices."""

    items: tuple[Subscript, ...]
    span: Span
    depth: int = 1

    @property
    def inner(self) -> Expr | None:
        """The expression in plain parentheses; None if this is a product of indices."""
        if len(self.items) == 1 and len(self.items[0].parts) == 1 and self.items[0].to is None:
            return self.items[0].parts[0]
        return None


@dataclass(frozen=True, eq=False)
class Unary:
    op: str  # "-", "not"
    operand: Expr
    span: Span
    depth: int = 1


@dataclass(frozen=True, eq=False)
class Binary:
    op: str  # + - * / ^ and or <= < >= > == !=
    left: Expr
    right: Expr
    span: Span
    depth: int = 1


@dataclass(frozen=True, eq=False)
class Choose:
    """``if c then a else b``: decided when the model is compiled."""

    condition: Expr
    then: Expr
    otherwise: Expr
    span: Span
    depth: int = 1


Expr = Literal | Ref | Call | Group | Unary | Binary | Choose


# -- statements and members ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ConstDecl:
    """``const name = config a.b, c else 1`` or ``const name = expr``."""

    name: Name
    keys: tuple[str, ...]
    value: Expr | None
    span: Span


@dataclass(frozen=True, eq=False)
class ConstFn:
    name: Name
    formals: tuple[Name, ...]
    value: Expr
    span: Span


@dataclass(frozen=True, eq=False)
class IndexDecl:
    """One index. ``kind``: time, history (``of``), size (``size``), range (``start .. size``) or
    alias (``alias``)."""

    name: Name
    kind: str
    span: Span
    size: Expr | None = None
    start: Expr | None = None
    of: Name | None = None
    alias: Subscript | None = None


@dataclass(frozen=True, eq=False)
class ParamDecl:
    name: Name
    subscripts: tuple[Subscript, ...]
    dtype: Name | None
    role: str  # param, state
    span: Span


@dataclass(frozen=True, eq=False)
class Setting:
    name: Name
    value: Expr
    span: Span


@dataclass(frozen=True, eq=False)
class UseDecl:
    """``use expert[e] = SwiGLU[d, f](eps = 1e-6)``."""

    name: Name
    array: Name | None
    block: Name
    indices: tuple[Name, ...]
    settings: tuple[Setting, ...]
    span: Span


@dataclass(frozen=True, eq=False)
class Formal:
    """``x[t,d]``, ``h[t,d]: f32``, ``token[t] of w``, ``after[t] = token[t + 1]``."""

    name: Name
    subscripts: tuple[Subscript, ...]
    of: Name | None
    dtype: Name | None
    value: Expr | None
    span: Span


@dataclass(frozen=True, eq=False)
class Result:
    name: Name
    subscripts: tuple[Subscript, ...]
    of: Name | None
    dtype: Name | None
    span: Span


@dataclass(frozen=True, eq=False)
class Equation:
    """``start`` is what a scan begins with: ``scan S[t,n] = ... from start``."""

    kind: str  # plain, let, cached, scan
    name: Name
    subscripts: tuple[Subscript, ...]
    dtype: Name | None
    value: Expr
    span: Span
    start: Expr | None = None


@dataclass(frozen=True, eq=False)
class If:
    """A compile-time choice between statements or members."""

    condition: Expr
    then: tuple[Item, ...]
    otherwise: tuple[Item, ...]
    span: Span
    depth: int = 1


@dataclass(frozen=True, eq=False)
class Def:
    """A function of a block. ``name`` is ``call`` for the unnamed one."""

    name: Name
    formals: tuple[Formal, ...]
    result: Result
    body: tuple[Item, ...]
    span: Span


Item = IndexDecl | ConstDecl | ParamDecl | UseDecl | Def | Equation | If


# -- declarations ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Import:
    path: Name  # std.mla, or a neighbouring file's name
    names: tuple[Name, ...]
    span: Span


@dataclass(frozen=True, eq=False)
class Kernel:
    """``kernel = "file.py:function" for sm_90``: who computes an ``extern`` function there."""

    where: str
    targets: tuple[Name, ...]
    span: Span


@dataclass(frozen=True, eq=False)
class Fn:
    """A function outside blocks: no parameters of its own, inlined where it is called. One that is
    ``extern`` stays whole, as kernels may compute it."""

    name: Name
    indices: tuple[Name, ...]
    formals: tuple[Formal, ...]
    result: Result
    body: tuple[Item, ...]
    span: Span
    extern: bool = False
    kernels: tuple[Kernel, ...] = ()


@dataclass(frozen=True, eq=False)
class Block:
    """``block`` or ``model`` (which takes no indices and has entry points)."""

    name: Name
    indices: tuple[Name, ...]
    settings: tuple[Setting, ...]
    members: tuple[Item, ...]
    span: Span
    is_model: bool = False


@dataclass(frozen=True, eq=False)
class Require:
    """``require config key = "a" | "b"`` (keys, allowed), ``require config key[i] = expr`` (keys,
    items) or ``require expr`` (condition)."""

    keys: tuple[str, ...]
    allowed: tuple[Literal, ...]
    condition: Expr | None
    span: Span
    items: Items | None = None


@dataclass(frozen=True, eq=False)
class Items:
    """What each item of a list must be, by its number."""

    number: Name
    value: Expr


@dataclass(frozen=True, eq=False)
class Dims:
    """A preset. ``base`` is the preset it changes; ``default`` holds where nothing is chosen."""

    name: Name
    base: Name | None
    default: bool
    settings: tuple[Setting, ...]
    span: Span


@dataclass(frozen=True, eq=False)
class NameEntry:
    name: Name
    array: Name | None
    template: Literal
    span: Span


@dataclass(frozen=True, eq=False)
class Names:
    """Where a checkpoint keeps the tensors of one block type."""

    block: Name
    entries: tuple[NameEntry, ...]
    ignored: tuple[Literal, ...]
    span: Span


Declaration = (
    Import | ConstDecl | ConstFn | IndexDecl | Require | Fn | Block | Names | Dims | Table | Deploy
)


@dataclass(frozen=True, eq=False)
class File:
    """A parsed file. ``broken`` are names declared in parts that did not parse: using one of them
    is no second mistake."""

    edition: Name | None
    declarations: tuple[Declaration, ...]
    broken: frozenset[str]
    span: Span
