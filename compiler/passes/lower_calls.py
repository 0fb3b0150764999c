"""Lowers calls: functions are inlined, blocks become ``call``, ``apply`` or ``chain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compiler.ir import Dim, Graph
from compiler.passes.build import Builder, Lifting, dim_of
from dsl import syntax as ast
from dsl import typed
from dsl.calls import bound_axis
from dsl.diagnostics import Span
from dsl.files import Unit
from dsl.instances import Instance

if TYPE_CHECKING:
    from compiler.passes.lower import BodyLowering


class Outlining:
    """The equations of an ``extern`` function as a body of their own, which the call names."""

    def __init__(self, lower: BodyLowering, fn: str, target: tuple[ast.Fn, Unit]):
        self.lower, (self.declared, self.unit) = lower, target
        bodies, stem = lower.elaborator.bodies, f"{lower.builder.name}.{fn}"
        self.name, number = stem, 1
        while self.name in bodies:
            number += 1
            self.name = f"{stem}.{number}"
        bodies[self.name] = Graph(self.name)  # claims the name
        self.outer = lower.builder
        self.operands: tuple[str, ...] = ()

    def begin(self, fn: typed.Fn, nodes: list[str]) -> list[str]:
        """The function's arguments, within; equations go there from now on."""
        self.operands = tuple(nodes)
        types = [self.lower.type(node) for node in nodes]
        self.lower.builder = Builder(self.name)
        return [
            self.lower.builder.add("input", (), type, formal.span, name=formal.name)
            for formal, type in zip(fn.definition.formals, types, strict=True)
        ]

    def end(self, result: str, own: tuple[tuple[str, ...], ...], span: Span) -> str:
        """The call, in the body that it stands in."""
        graph = self.lower.builder.finish(result)
        self.lower.elaborator.bodies[self.name] = graph
        self.leave()
        folder = Path(self.unit.source.name).parent
        serving = [(t.text, k.where) for k in self.declared.kernels for t in k.targets]
        type = graph.result.type
        return self.lower.emit(
            "extern",
            self.operands,
            type.dims,
            type.dtype,
            span,
            type.of,
            body=self.name,
            own=own,
            targets=tuple(target for target, _ in serving),
            kernels=tuple((folder / where).as_posix() for _, where in serving),
        )

    def leave(self) -> None:
        self.lower.builder = self.outer


def call_fn(lower: BodyLowering, e: typed.CallFn) -> str:
    """The function's equations, with its indices standing for the caller's."""
    from compiler.passes.lower import Frame

    target: tuple[ast.Fn, Unit] = e.target
    fn = lower.elaborator.instances.fn(*target)
    nodes = [lower.expr(a) for a in e.args]
    dims = {formal: lower.dim(axis) for formal, axis in e.bind}
    strong = {lower.type(n).dtype for n in nodes if lower.builder[n].op != "constant"}
    natural = "f32" if "f32" in strong else "act"
    frame = Frame(f"fn {fn.name}", fn.scope, dims, natural=natural, inlined=True)
    outlining = Outlining(lower, fn.name, target) if target[0].extern else None
    if outlining is not None:
        nodes = outlining.begin(fn, nodes)
    for formal, node in zip(fn.definition.formals, nodes, strict=True):
        frame.values[formal.name] = node
    before, lower.frame = lower.frame, frame
    f32, lower.f32 = lower.f32, False
    try:
        lower.equations(fn.definition)
        result = frame.values[fn.definition.result]
        if outlining is not None:
            own = [tuple(lower.dim(a).name for a in f.axes) for f in fn.definition.formals]
            own.append(tuple(lower.dim(a).name for a in fn.definition.result_axes))
            result = outlining.end(result, tuple(own), e.span)
    finally:
        lower.frame = before
        lower.f32 = f32
        if outlining is not None:
            outlining.leave()
    return lower.cast(result, "f32", e.span) if f32 else result


def _arguments(
    lower: BodyLowering,
    e: typed.CallBlock | typed.Chain,
    callee: Instance,
    method: str,
    bind: dict[typed.Index, typed.Axis],
) -> tuple[list[str], list[tuple[Dim, ...]], dict[str, str]]:
    """Argument nodes, the dims each is lifted over, and the caller's names of the callee's dims."""
    f32, lower.f32 = lower.f32, False
    try:
        nodes = [lower.expr(a) for a in e.args]
    finally:
        lower.f32 = f32
    definition = callee.block.defs[method]
    nodes = [
        lower.as_float(node, formal.dtype, e.span) if formal.of is None else node
        for formal, node in zip(definition.formals, nodes, strict=True)
    ]
    lifted: list[tuple[Dim, ...]] = []
    names: dict[str, str] = {}
    for formal, node in zip(definition.formals, nodes, strict=True):
        own = {dim_of(callee, a).name: lower.dim(bound_axis(a, bind)).name for a in formal.axes}
        names |= own
        lifted.append(tuple(d for d in lower.type(node).dims if d.name not in own.values()))
    return nodes, lifted, names


def call_block(lower: BodyLowering, e: typed.CallBlock) -> str:
    if e.pick is not None:
        return _apply(lower, e)
    if e.use is None:
        callee, bind, child = lower.instance, {}, ""
    else:
        use = next(u for u in lower.instance.block.uses if u.name == e.use)
        callee, bind, child = (
            lower.elaborator.instances.used(lower.instance, use),
            _bind(lower, use),
            use.name,
        )
    nodes, lifted, names = _arguments(lower, e, callee, e.method, bind)
    body, carried = lower.elaborator.body(callee, e.method, Lifting(tuple(lifted)))
    dims, of, pairs = _result(lower, callee, e.method, bind, body, carried, names)
    dtype = lower.elaborator.bodies[body].result.type.dtype
    node = lower.emit("call", nodes, dims, dtype, e.span, of, body=body, child=child, dims=pairs)
    return lower.cast(node, "f32", e.span) if lower.f32 else node


def call_chain(lower: BodyLowering, e: typed.Chain) -> str:
    use = next(u for u in lower.instance.block.uses if u.name == e.use and u.array is e.index)
    callee = lower.elaborator.instances.used(lower.instance, use)
    bind = _bind(lower, use)
    nodes, lifted, names = _arguments(lower, e, callee, "call", bind)
    body, carried = lower.elaborator.body(callee, "call", Lifting(tuple(lifted)))
    _, of, pairs = _result(lower, callee, "call", bind, body, carried, names)
    index = dim_of(lower.instance, e.index)
    type = lower.type(nodes[0])
    return lower.emit(
        "chain",
        nodes,
        type.dims,
        type.dtype,
        e.span,
        of,
        body=body,
        child=use.name,
        index=index,
        dims=pairs,
    )


def _apply(lower: BodyLowering, e: typed.CallBlock) -> str:
    assert e.pick is not None
    use = next(u for u in lower.instance.block.uses if (u.name, u.array) == (e.use, e.array))
    callee = lower.elaborator.instances.used(lower.instance, use)
    bind = _bind(lower, use)
    f32, lower.f32 = lower.f32, False
    pick = e.pick
    picked = lower.iota(pick.index, pick.span) if isinstance(pick, typed.Iota) else lower.expr(pick)
    lower.f32 = f32
    nodes, lifted, names = _arguments(lower, e, callee, e.method, bind)
    rows = list(lower.type(picked).dims)
    extra = tuple(dict.fromkeys(d for arg in lifted for d in arg if d not in rows))
    if extra:  # the same pick for every token: each row still runs the picked block
        type = lower.type(picked)
        picked = lower.emit(
            "expand", (picked,), (*extra, *rows), "i64", e.span, type.of, dims=extra
        )
        rows = [*extra, *rows]
    body, _ = lower.elaborator.body(callee, e.method, Lifting(tuple(lifted), rows=True))
    dims, of, pairs = _result(lower, callee, e.method, bind, body, {}, names)
    inner = [d for d in dims if d.kind != "rows"]
    dtype = lower.elaborator.bodies[body].result.type.dtype
    assert use.array is not None
    over = lower.type(picked).of
    node = lower.emit(
        "apply",
        (picked, *nodes),
        (*rows, *inner),
        dtype,
        e.span,
        of,
        body=body,
        child=use.name,
        over=over.name if over else "",
        rows=tuple(d.name for d in rows),
        dims=pairs,
    )
    return lower.cast(node, "f32", e.span) if lower.f32 else node


def _bind(lower: BodyLowering, use: typed.Use) -> dict[typed.Index, typed.Axis]:
    target: tuple[ast.Block, Unit] = use.target
    return dict(zip(lower.elaborator.source.checker.formals(target[0]), use.bind, strict=True))


def _result(
    lower: BodyLowering,
    callee: Instance,
    method: str,
    bind: dict[typed.Index, typed.Axis],
    body: str,
    carried: dict[str, Dim],
    names: dict[str, str],
) -> tuple[tuple[Dim, ...], Dim | None, tuple[tuple[str, str], ...]]:
    """The result's dims under the caller's names, and the pairs (body's name, caller's name)."""
    definition = callee.block.defs[method]
    outside = {d.name: outer for outer, d in carried.items()}
    known: dict[str, Dim] = {}
    for axis in definition.result_axes:
        dim = lower.dim(bound_axis(axis, bind))
        names[dim_of(callee, axis).name] = dim.name
        known[dim_of(callee, axis).name] = dim
    names |= outside
    dims: list[Dim] = []
    result = lower.elaborator.bodies[body].result.type
    for d in result.dims:
        if d.name in known:
            dims.append(known[d.name])
        elif d.name in outside:
            dims.append(Dim(outside[d.name], d.size, d.kind, d.form, d.parts, d.start))
        else:
            dims.append(d)
    of = (
        lower.dim(bound_axis(definition.result_of, bind))
        if definition.result_of is not None
        else None
    )
    pairs = tuple(sorted((k, v) for k, v in names.items() if k != v))
    return tuple(dims), of, pairs
