"""Lowers one def to a body: equations to nodes, subscripts to views, products to contractions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compiler import rules
from compiler.ir import ROWS, Dim, Graph, Type
from compiler.passes.build import Builder, Lifting, dim_of
from compiler.passes.lower_calls import call_block, call_chain, call_fn
from compiler.passes.lower_exprs import FLOATS, choice, contraction, join, reduce
from compiler.passes.recurrences import before, scan
from compiler.passes.views import subscripted
from dsl import syntax as ast
from dsl import typed
from dsl.constants import Constant, ConstantError
from dsl.diagnostics import Span
from dsl.extents import Extent, ExtentError
from dsl.instances import Instance, fail
from dsl.scope import ConstScope, atoms

if TYPE_CHECKING:
    from compiler.passes.elaborate import Elaborator


@dataclass
class Frame:
    """What names mean in the def, or in a function inlined into it.

    ``dims`` gives each index its dim; ``values`` each name its node; ``natural`` is the dtype that
    a plain name rounds to.
    """

    owner: str
    scope: ConstScope
    dims: dict[typed.Index, Dim]
    values: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)  # of scans, at the token before
    natural: str = "act"
    inlined: bool = False


class BodyLowering:
    """Builds the body of one def of a module, lifted over ``lifting``."""

    def __init__(
        self,
        elaborator: Elaborator,
        instance: Instance,
        method: str,
        lifting: Lifting,
        name: str,
    ):
        self.elaborator = elaborator
        self.instance = instance
        self.definition = instance.block.defs[method]
        self.builder = Builder(name)
        self.dim_names: dict[str, object] = {}  # who owns each dim name of this body
        self.lifting = lifting
        self.frame = Frame(instance.name, self._scope(), {})
        self.f32 = False
        for index in self._own_indices():
            self.dim(index)
        self.lifted = self._lifted_dims()

    def _scope(self) -> ConstScope:
        scope: ConstScope = self.instance.block.scope
        local = {
            n: ast.ConstDecl(ast.Name(n, e.span), (), e, e.span)
            for n, e in self.definition.constants.items()
        }
        return ConstScope(
            scope.owner,
            scope.functions,
            {**scope.local, **local},
            scope.settings,
            dict(scope.indices),
        )

    def _own_indices(self) -> Iterable[typed.Index]:
        """Indices of the def's signature and equations: their names come before lifted ones."""
        definition = self.definition
        axes = [a for f in definition.formals for a in f.axes] + list(definition.result_axes)
        axes += [a for e in definition.equations for a in (*e.written, *e.axes)]
        axes += [a for s in self.instance.block.stored for a in s.axes]
        return dict.fromkeys(i for a in axes for i in atoms(a))

    def _lifted_dims(self) -> dict[str, Dim]:
        """The caller's dims under names that are free here."""
        out: dict[str, Dim] = {}
        for arg in self.lifting.dims:
            for dim in arg:
                if dim.name not in out:
                    out[dim.name] = self._claim(dim, ("lifted", dim.name, dim.kind))
        return out

    # -- dims ------------------------------------------------------------------------------------

    def _claim(self, dim: Dim, owner: object) -> Dim:
        """``dim`` under a name that is its own in this body. Time and history are one each."""
        if dim.kind in ("time", "history"):
            owner = dim.kind
        name, number = dim.name, 1
        while self.dim_names.setdefault(name, owner) != owner:
            name, number = f"{dim.name}_{number}", number + 1
        if name == dim.name:
            return dim
        return Dim(name, dim.size, dim.kind, dim.form, dim.parts, dim.start)

    def dim(self, axis: typed.Axis) -> Dim:
        """The dim of an axis in the current frame."""
        if isinstance(axis, typed.Index):
            known = self.frame.dims.get(axis)
            if known is None:
                size = self.extent(axis.extent)
                self._whole(axis, size)
                dim = Dim(axis.name, size, axis.kind, start=self.extent(axis.start))  # type: ignore[arg-type]
                known = self._claim(dim, (self.frame.owner, axis.name, str(size)))
                self.frame.dims[axis] = known
            return known
        parts = [self.dim(p) for p in axis.parts]
        return Dim.sum(parts) if isinstance(axis, typed.Sum) else Dim.product(parts)

    def _whole(self, index: typed.Index, size: Extent) -> None:
        """An index of a def or of a function has a whole extent of at least one here."""
        if index.kind != "plain":
            return
        try:
            if size.at(self.elaborator.instances.sizes) >= 1:
                return
            text = f"{size}, which is less than 1"
        except ExtentError as error:
            text = str(error)
        raise fail("E0304", f"index '{index.name}' has extent {text}", index.span)

    def extent(self, extent: Extent) -> Extent:
        """An extent in constants only: formal sizes of the block, or of an inlined function."""
        symbols = dict(self.instance.symbols)
        if self.frame.inlined:
            symbols |= {f"size({i.name})": d.size for i, d in self.frame.dims.items() if i.formal}
        return extent.substitute(symbols)

    # -- nodes -----------------------------------------------------------------------------------

    def emit(
        self,
        op: str,
        inputs: Iterable[str],
        dims: Iterable[Dim],
        dtype: Any,
        span: Span | None,
        of: Dim | None = None,
        /,
        **attrs: Any,
    ) -> str:
        return self.builder.add(op, tuple(inputs), Type(dtype, tuple(dims), of), span, **attrs)

    def type(self, node: str) -> Type:
        return self.builder.type(node)

    def union(self, *nodes: str) -> tuple[Dim, ...]:
        """Dims of an unnamed result: tokens, then those carried through, then as they come."""
        dims = rules.union(self.type(n) for n in nodes)
        carried = {d.name for d in self.lifted.values()}
        return tuple(
            sorted(dims, key=lambda d: (d.kind not in ("time", "rows"), d.name not in carried))
        )

    def cast(self, node: str, dtype: str, span: Span | None) -> str:
        """The value in another float type; whole numbers and truth values are left alone."""
        type = self.type(node)
        if type.dtype == dtype or type.dtype not in FLOATS or self.builder[node].op == "constant":
            return node
        return self.emit("cast", (node,), type.dims, dtype, span)

    def as_float(self, node: str, dtype: str, span: Span | None) -> str:
        """A number in a float type, be it a whole number here: blocks take and give floats."""
        type = self.type(node)
        if type.dtype == "i64":
            return self.emit("cast", (node,), type.dims, dtype, span)
        return self.cast(node, dtype, span)

    def map(self, fn: str, args: tuple[str, ...], span: Span | None) -> str:
        types = [self.type(a) for a in args]
        dims = self.union(*args)
        if fn in rules._COMPARE:
            return self.emit("map", args, dims, "bool", span, fn=fn)
        of = args[1:] if fn == "where" else args
        dtype = (
            types[1].dtype
            if fn == "where" and types[1].dtype == "bool"
            else self.builder.dtype(*of)
        )
        if dtype == "i64" and fn not in rules._WHOLE and fn != "where":
            dtype = "f32"
        return self.emit("map", args, dims, dtype, span, fn=fn)

    def constant(self, value: Constant, span: Span, name: str = "") -> str:
        dtype = "bool" if isinstance(value, bool) else "i64" if isinstance(value, int) else "act"
        attrs = {"value": value} | ({"name": name} if name else {})
        return self.emit("constant", (), (), dtype, span, **attrs)

    def iota(self, index: typed.Index, span: Span) -> str:
        """Every place along an index, counted from its first."""
        dim = self.dim(index)
        return self.emit("iota", (), (dim,), "i64", span, dim)

    # -- compile-time values -----------------------------------------------------------------------

    def number(self, expr: ast.Expr, scope: ConstScope | None = None) -> Constant:
        """The value of a compile-time expression, whose names mean what ``scope`` says."""
        names = scope if scope is not None else self.frame.scope
        instances = self.elaborator.instances

        def look(name: str, span: Span) -> Constant:
            if name in names.local:
                value = names.local[name].value
                assert value is not None
                return self.number(value, names)
            if not self.frame.inlined and name in self.instance.settings:
                return self.instance.settings[name]
            return instances.constants.value(name, span)

        def size(name: str, span: Span) -> Constant:
            if name not in names.indices:
                raise ConstantError("E0206", f"no index is called '{name}'", span)
            return self.dim(names.indices[name]).size.at(instances.sizes)

        return instances.evaluate(expr, look, size)

    # -- the def -----------------------------------------------------------------------------------

    def run(self) -> Graph:
        definition = self.definition
        for formal, lifted in zip(definition.formals, self.lifting.dims, strict=True):
            own = tuple(self.dim(a) for a in formal.axes)
            dims = tuple(self.lifted[d.name] for d in lifted)
            if self.lifting.rows:
                dims = self._rows(dims)
            of = self.dim(formal.of) if formal.of is not None else None
            dtype = "i64" if of is not None else formal.dtype
            self.frame.values[formal.name] = self.emit(
                "input", (), dims + own, dtype, formal.span, of, name=formal.name
            )
        self.equations(definition)
        result = self.frame.values[definition.result]
        if definition.result_of is None and self.type(result).dtype == "i64":
            result = self.as_float(result, "act", definition.span)
        return self.builder.finish(result)

    def _rows(self, dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """The rows of one block of an array, for an argument that differs between rows."""
        return (self._claim(Dim("rows", ROWS, "rows"), "rows"),) if dims else ()

    def equations(self, definition: typed.Def) -> None:
        for equation in definition.equations:
            self.frame.values[equation.name] = self._equation(equation)

    def _equation(self, e: typed.Equation) -> str:
        wide = e.dtype == "f32" or (e.kind == "scan" and e.dtype is None)
        outer, self.f32 = self.f32, wide or (self.f32 and self.frame.inlined)
        try:
            node = self.expr(e.value)
        finally:
            f32, self.f32 = self.f32, outer
        written, axes = e.written, e.axes
        if e.kind == "cached":
            written = axes = tuple(
                a.of if isinstance(a, typed.Index) and a.kind == "history" and a.of else a
                for a in axes
            )
        node = self._shape(node, written, axes, e.span)
        wanted = "f32" if f32 else None if e.kind == "let" else (e.dtype or self.frame.natural)
        if e.dtype == "f32" and e.value.kind == "number":
            node = self.as_float(node, "f32", e.span)
        elif wanted is not None:
            node = self.cast(node, wanted, e.span)
        if e.kind == "scan":
            node = scan(self, e, node)
        if e.kind == "cached":
            type = self.type(node)
            dims = [self.dim(a) for a in e.axes]
            carried = [d for d in type.dims if d.kind != "time" and d not in dims]
            node = self.emit(
                "cache", (node,), (*carried, *dims), type.dtype, e.span, type.of, name=e.name
            )
        taken = node in self.frame.values.values()
        return self.builder.name_value(
            node, e.name, e.kind != "let", e.span, taken, trace=not self.frame.inlined
        )

    def _shape(
        self, node: str, written: tuple[typed.Axis, ...], axes: tuple[typed.Axis, ...], span: Span
    ) -> str:
        """Join products on the left, and put dims in the order of the source."""
        for w, a in zip(written, axes, strict=True):
            node = self._join(node, w, self.dim(a), span)
        missing = [self.dim(a) for a in axes if self.dim(a).name not in self.type(node).names]
        if missing:  # a number for every place: y[d] = 0
            node = self.emit(
                "expand",
                (node,),
                (*self.type(node).dims, *missing),
                self.type(node).dtype,
                span,
                dims=tuple(missing),
            )
        own = [self.dim(a) for a in axes]
        names = {d.name for d in own}
        dims = (*[d for d in self.type(node).dims if d.name not in names], *own)
        return self.ordered(node, dims)

    def _join(self, node: str, axis: typed.Axis, into: Dim, span: Span) -> str:
        names = self.type(node).names
        if not isinstance(axis, typed.Product):
            dim = self.dim(axis)
            if dim.name == into.name or dim.name not in names:
                return node
            return self.view("rename", node, [dim.name], [into], span, dim=dim.name, to=into)
        for part in axis.parts:
            if isinstance(part, typed.Product):
                node = self._join(node, part, self.dim(part), span)
        parts = tuple(self.dim(p).name for p in axis.parts)
        if not set(parts) <= set(self.type(node).names):
            return node
        return self.view("flatten", node, list(parts), [into], span, dims=parts, into=into)

    def view(
        self, op: str, node: str, old: list[str], new: list[Dim], span: Span | None, /, **attrs: Any
    ) -> str:
        """A view in which dims ``old`` are replaced, where the first of them stands, by ``new``."""
        type = self.type(node)
        dims: list[Dim] = []
        for d in type.dims:
            if d.name == old[0]:
                dims += new
            elif d.name not in old:
                dims.append(d)
        return self.emit(op, (node,), dims, type.dtype, span, type.of, **attrs)

    def ordered(self, node: str, dims: tuple[Dim, ...]) -> str:
        """The same value with its dims in this order: free to choose where it is made."""
        old = self.builder[node]
        if old.type.dims == dims:
            return node
        type = Type(old.type.dtype, dims, old.type.of)
        if old.op in ("param", "state", "input") or old.label is not None or old.rounds:
            return self.builder.add("cast", (node,), type, old.span)
        self.builder.nodes[node] = old.with_(type=type)
        return node

    # -- expressions -------------------------------------------------------------------------------

    def expr(self, e: typed.Expr) -> str:
        match e:
            case typed.Scalar():
                name = e.value.name.text if isinstance(e.value, ast.Ref) else ""
                value = self.number(e.value, e.scope)
                if value is None or isinstance(value, str):
                    shown = "null" if value is None else f'"{value}"'
                    raise fail("E0303", f"this is {shown}, not a number", e.span)
                return self.constant(value, e.span, name)
            case typed.Value():
                return self._value(e)
            case typed.Iota(index=index):
                node, start = self.iota(index, e.span), self.dim(index).start
                if not start.terms:
                    return node
                first = self.constant(start.at(self.elaborator.instances.sizes), e.span)
                return self.map("add", (node, first), e.span)
            case typed.Position(index=index):
                return self.emit("position", (), (self.dim(index),), "i64", e.span)
            case typed.Map(fn=fn, args=args):
                return self.map(fn, tuple(self.expr(a) for a in args), e.span)
            case typed.Contraction():
                return contraction(self, e)
            case typed.Reduce():
                return reduce(self, e)
            case typed.Choice():
                return choice(self, e)
            case typed.Join():
                return join(self, e)
            case typed.Broadcast(axes=axes, arg=arg):
                node = self.expr(arg)
                dims = tuple(self.dim(a) for a in axes)
                type = self.type(node)
                return self.emit(
                    "expand", (node,), (*dims, *type.dims), type.dtype, e.span, type.of, dims=dims
                )
            case typed.CallFn():
                return call_fn(self, e)
            case typed.CallBlock():
                return call_block(self, e)
            case typed.Chain():
                return call_chain(self, e)
        raise AssertionError(f"no lowering for {e.__class__.__name__}")

    def _value(self, e: typed.Value) -> str:
        if e.role == "value":
            node = self.frame.values[e.name]
        elif e.role == "before":
            node = before(self, e)
        else:
            stored = next(s for s in self.instance.block.stored if s.name == e.name)
            dims = [dim_of(self.instance, a) for a in stored.axes]
            node = self.emit(e.role, (), dims, stored.dtype, stored.span, param=e.name)
        node = subscripted(self, node, e)
        return self.cast(node, "f32", e.span) if self.f32 else node
