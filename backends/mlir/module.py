"""A program as the text of one MLIR module: ``prefill`` and ``decode``, and the weights they read.

    prefill(tokens [batch, time], past [batch], count [batch], wanted [n], held, caches...)
    decode(tokens [1, 1], past [1], caches...)

Both give the logits of the wanted rows (f32) and the caches. ``past`` are each sequence's
positions before the step, ``held`` the most of them, ``count`` how many of the step's tokens count;
``wanted`` numbers rows of [batch * time]. A cache is ``[arrays.., batch, capacity, ...]``, and is
updated in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from backends.mlir import coded, experts, lower_ops  # noqa: F401 (they register what they lower)
from backends.mlir.linalg import Linalg
from backends.mlir.lower import Frame, lacking
from backends.mlir.step import ENTRY, Key, Step, Weights
from backends.mlir.values import BATCH, Axis, Code, Element, Size, Unsupported, Value
from compiler import spec
from compiler.ir import Graph, Program
from compiler.tensors import CachePattern, Pattern, patterns

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Module:
    """The module's text, and what it needs to run."""

    text: str
    name: str
    parameters: dict[str, Pattern]  # by the name of the stacked tensor
    caches: tuple[CachePattern, ...]
    element: Element
    packed: frozenset[str] = frozenset()  # which stacked tensors are (``Weights``)


def lower(program: Program, kept: list[CachePattern], element: Element) -> Module:
    """The program as a module.

    Args:
        kept: its caches and states, from the program as elaborated.
        element: what activations and weights are: f32 or bf16.

    Raises:
        Unsupported: it has an op without a lowering, or inputs that a step cannot be given.
    """
    supported(program)
    kept = [row for row in kept if ENTRY in row.entries]
    known = {(p.path, p.ranges): p for p in patterns(program)}
    first = Weights(known, element)  # to see how each weight is read
    for name in (PREFILL, DECODE):
        _function(program, kept, first, name)
    weights = Weights(known, element, frozenset(first.used.keys() - first.loose))
    functions = [_function(program, kept, weights, name) for name in (PREFILL, DECODE)]
    name = _symbol(program.name)
    lines = [f"module @{name} {{"]
    lines += [
        f'  util.global private @"{kept.name}" = #flow.parameter.named<"model"::"{kept.name}"> : '
        f"{kept.type}"
        for pattern in weights.used.values()
        for kept in weights.stacked(pattern)
    ]
    text = "\n".join([*lines, *functions, "}", ""])
    return Module(text, name, dict(weights.used), tuple(kept), element, weights.packed)


def supported(program: Program) -> None:
    """Raises ``Unsupported`` if an op has no lowering, or a step cannot be given the inputs."""
    node = lacking(_reached(program))
    if node is not None:
        place = f"{node.span}: " if node.span else ""
        raise Unsupported(
            f"{place}the MLIR backend cannot compile '{node.op}' ({spec.op(node).says}); "
            "--backend pytorch can"
        )
    body = program.bodies[program.entries[ENTRY].body]
    if len(body.inputs) != 1 or body.inputs[0].type.dtype != "i64":
        names = ", ".join(n.attrs["name"] for n in body.inputs)
        raise Unsupported(f"the MLIR backend takes one input of token numbers, not {names}")


def _symbol(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _reached(program: Program) -> dict[str, Graph]:
    """The bodies that the entry runs; of a composite, what it stands for."""
    todo, found = [program.entries[ENTRY].body], dict[str, Graph]()
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = program.bodies[name]
            todo += [r.body for n in found[name] for r in spec.runs(n, found[name])]
    return found


def cache_axes(row: CachePattern, batch: Size, capacity: Size) -> tuple[Axis, ...]:
    arrays = [Axis(f"@{n}", len(r)) for n, r in enumerate(row.ranges)]
    own = [Axis(f".{n}", size) for n, size in zip(row.dims, row.shape, strict=True)]
    return (*arrays, Axis(BATCH, batch), Axis("@capacity", capacity), *own)


def _function(program: Program, kept: list[CachePattern], weights: Weights, name: str) -> str:
    entry = program.entries[ENTRY]
    body = program.bodies[entry.body]
    code = Code()
    ops = Linalg(code)
    single = name == DECODE
    batch: Size = 1 if single else "%batch"
    time: Size = 1 if single else "%time"
    wanted: Size = 1 if single else "%wanted"
    capacity: Size = "%capacity"
    b, w = Axis(BATCH, batch), Axis("@wanted", wanted)
    tokens = Value("%tokens", (b, Axis("@time", time)), "i64")
    past = Value("%past", (b,), "i64")
    count = None if single else Value("%count", (b,), "i64")
    rows = None if single else Value("%rows", (w,), "i64")
    arguments = [tokens, past, *([count, rows] if count and rows else [])]
    held = [
        Value(
            f"%cache{n}",
            cache_axes(row, batch, capacity),
            weights.act if row.dtype == "act" else "f32",
        )
        for n, row in enumerate(kept)
    ]
    given = [f"{v.name}: {v.type}" for v in arguments]
    if not single:
        given.append("%most: i64")
    given += [
        f"{v.name}: {v.type} {{iree.abi.output = {n} : index}}" for n, v in enumerate(held, start=1)
    ]
    head = []
    if single:
        head.append("%before = tensor.extract %past[%c0] : tensor<1xi64>")
        head.append("%held = arith.index_cast %before : i64 to index")
    else:
        head.append(f"%batch = tensor.dim %tokens, %c0 : {tokens.type}")
        head.append(f"%time = tensor.dim %tokens, %c1 : {tokens.type}")
        head.append("%wanted = tensor.dim %rows, %c0 : tensor<?xi64>")
        head.append("%held = arith.index_cast %most : i64 to index")
    if held:
        at = held[0].names.index("@capacity")
        head.append(f"%capacity = tensor.dim {held[0].name}, {code.index(at)} : {held[0].type}")
    code.index(0), code.index(1)
    code.lines += [f"    {line}" for line in head]
    step = Step(
        program, code, ops, weights.act, weights, batch, time, "%held", wanted,
        past, count, rows, {}, {},
    )  # fmt: skip
    keys: list[Key] = [(row.path, row.ranges) for row in kept]
    step.caches.update(zip(keys, held, strict=True))
    for key, cache in step.caches.items():
        axes = [Axis(a.name, time) if a.name == "@capacity" else a for a in cache.axes]
        step.kept[key] = ops.fill(ops.empty(axes, cache.element), 0)
    frame = Frame.entry(step, body, tokens)
    logits = frame.settled(frame.evaluate())
    order = [frame.axis(d) for d in body.result.type.dims]
    logits = ops.cast(ops.full(logits, order), "f32")
    new = [_written(step, cache, step.kept[key]) for key, cache in step.caches.items()]
    types = ", ".join(v.type for v in (logits, *new))
    code.add(f"return {', '.join(v.name for v in (logits, *new))} : {types}")
    begin = f"  func.func @{name}({', '.join(given)}) -> ({types}) {{"
    return "\n".join([begin, *code.text(), "  }"])


def _written(step: Step, cache: Value, rows: Value) -> Value:
    """The step's rows put into a cache, each sequence's after its own positions."""
    ops, code = step.ops, step.code
    at = cache.names.index("@capacity")
    lead, own = cache.names[: at + 1], cache.names[at + 1 :]
    rows_axes = [rows.axis(n) for n in lead]
    # The number of a row in the cache as one table of rows.
    place = step.position.renamed({"@time": "@row"})
    place = ops.split(place, "@row", [Axis(BATCH, step.batch), Axis("@capacity", step.time)])
    sizes = [cache.axis(n).size for n in lead]
    number: Value = ops.map(
        "add",
        [place, ops.map("mul", [ops.iota(Axis(BATCH, step.batch)), step.number(sizes[at])], "i64")],
        "i64",
    )
    for n in range(at - 1):
        stride = code.product(sizes[n + 1 :])
        along = ops.map("mul", [ops.iota(rows_axes[n]), step.number(stride)], "i64")
        number = ops.map("add", [number, along], "i64")
    number = ops.full(number, rows_axes)
    number = ops.merge(number, lead, "@row")
    table = ops.merge(cache, lead, "@row")
    table = (
        ops.merge(table, own, "@own")
        if own
        else ops.split(table, "@row", [table.axes[0], Axis("@own", 1)])
    )
    new = ops.merge(rows, lead, "@row")
    new = (
        ops.merge(new, own, "@own")
        if own
        else ops.split(new, "@row", [new.axes[0], Axis("@own", 1)])
    )
    index = ops.split(number, "@row", [number.axes[0], Axis("@one", 1)])
    found = code.define(
        f"iree_linalg_ext.scatter dimension_map = [0] unique_indices(true) "
        f"ins({new.name}, {index.name} : {new.type}, {index.type}) "
        f"outs({table.name} : {table.type}) {{ ^bb0(%new: {new.element}, %old: {new.element}): "
        f"iree_linalg_ext.yield %new : {new.element} }} -> {table.type}"
    )
    written = Value(found, table.axes, table.element)
    written = (
        ops.split(written, "@own", [cache.axis(n) for n in own])
        if own
        else ops.merge(written, ["@row", "@own"], "@row")
    )
    return ops.split(written, "@row", [cache.axis(n) for n in lead])
