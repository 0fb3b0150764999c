"""``apply``: every row through the blocks that it picked, without copying a weight.

Few rows, whose number is known (the decoding of one sequence): each pick is read by the host, and
the block's weights are a slice of the stacked ones at that place. Only chosen blocks are read.

Any number of rows (prefill): rows are brought into the order of their blocks, and each block runs
on its stretch of them, which may be empty: then none of its weights are read either.
"""

from __future__ import annotations

from backends.mlir.lower import Frame, lowers
from backends.mlir.step import BLOCKS as BLOCKS_AXIS
from backends.mlir.values import Axis, Element, Size, Value
from compiler.ir import Node
from compiler.signatures import block_rows

FEW = 64  # picks that are taken one by one
# Blocks written one after the other in a loop's body: IREE copies what a loop carries each time
# round (16 MB of rows for 512 tokens of the 813M shape), and compiles as many calls as there are.
BLOCKS = 32


@lowers("apply")
def apply(frame: Frame, node: Node, args: list[Value]) -> Value:
    pick, *given = args
    names: tuple[str, ...] = node.attrs["rows"]
    rows = [pick.axis(name) for name in names]
    if not frame.ops.loops:
        return _all(frame, node, pick, given)
    pairs = frame.code.product([axis.size for axis in rows])
    flat = frame.ops.merge(frame.ops.transpose(pick, names), names, "@pair")
    if isinstance(pairs, int) and pairs <= FEW:
        out = _one_by_one(frame, node, flat, rows, pairs, given)
    else:
        out = _grouped(frame, node, flat, rows, given)
    return frame.ops.split(out, "@pair", rows)


def _block(
    frame: Frame, node: Node, block: Size, rows: Size, given: list[Value], order: list[Axis]
) -> Value:
    """One block on its rows, which lie along an axis called ``@pair``."""
    a = node.attrs
    own = block_rows(frame.step.program.bodies[a["body"]])
    dims = [*a["dims"], (own, "@pair")]
    out = frame.run(a["body"], given, a["child"], block, dims, over=node, rows=rows)
    axes = [Axis("@pair", rows), *order]
    return frame.ops.cast(frame.ops.full(out, axes), _element(frame, node))


def _element(frame: Frame, node: Node) -> Element:
    return frame.stored(node.type.dtype)


def _one_by_one(
    frame: Frame, node: Node, flat: Value, rows: list[Axis], pairs: int, given: list[Value]
) -> Value:
    ops, code = frame.ops, frame.code
    order = [frame.axis(d) for d in node.type.dims if d.name not in node.attrs["rows"]]
    out = ops.empty([Axis("@pair", pairs), *order], _element(frame, node))
    blocks = []
    for pair in range(pairs):
        # Not a constant, so that the code of one pick is that of all.
        at_pair = code.define(f"util.optimization_barrier {code.index(pair)} : index")
        pick = code.define(f"tensor.extract {flat.name}[{at_pair}] : {flat.type}")
        blocks.append(code.define(f"arith.index_cast {pick} : i64 to index"))
    for pair, block in enumerate(blocks):
        mine = []
        for value in given:
            at, left = {}, pair
            for axis in reversed(rows):
                assert isinstance(axis.size, int)
                left, place = divmod(left, axis.size)
                at[axis.name] = place
            own = [axis.name for axis in rows if axis.name in value.names]
            if own:
                ranges: dict[str, tuple[Size, Size]] = {n: (at[n], 1) for n in own}
                value = ops.slice(value, ranges)
                value = ops.merge(ops.transpose(value, [*own, *_rest(value, own)]), own, "@pair")
            mine.append(value)
        made = _block(frame, node, block, 1, mine, order)
        out = ops.insert(made, out, {"@pair": pair})
    return out


def _all(frame: Frame, node: Node, pick: Value, given: list[Value]) -> Value:
    """All blocks on all rows, and of those the chosen: where there are no loops."""
    a, ops = node.attrs, frame.ops
    own = block_rows(frame.step.program.bodies[a["body"]])
    rows = [axis for axis in pick.axes if any(axis.name in v.names for v in given)]
    names = [axis.name for axis in rows]
    whole = []
    for value in given:
        if any(name in value.names for name in names):
            rest = [axis for axis in value.axes if axis.name not in names]
            value = ops.merge(ops.full(value, [*rows, *rest]), names, "@pair")
        whole.append(value)
    dims = [*a["dims"], (own, "@pair")]
    count = frame.code.product([axis.size for axis in rows])
    out = frame.run(a["body"], whole, a["child"], None, dims, over=node, rows=count)
    return ops.gather(ops.split(out, "@pair", rows), BLOCKS_AXIS, pick)


def _rest(value: Value, names: list[str]) -> list[str]:
    return [n for n in value.names if n not in names]


def _grouped(frame: Frame, node: Node, flat: Value, rows: list[Axis], given: list[Value]) -> Value:
    ops, code, step = frame.ops, frame.code, frame.step
    over = frame.graph[node.inputs[0]].type.of
    assert over is not None
    blocks = step.program.size(over)
    order = [frame.axis(d) for d in node.type.dims if d.name not in node.attrs["rows"]]
    pair = flat.axes[0]
    # Where each pair comes in the order of blocks, and which pair comes at each place.
    place = ops.rank(ops.map("neg", [flat], "i64"), "@pair")
    there = place.renamed({"@pair": "@from"})
    here = ops.map("eq", [there, ops.iota(Axis("@pair", pair.size))], "i1")
    source = ops.map("where", [here, ops.iota(Axis("@from", pair.size)), step.constant(0)], "i64")
    source = ops.reduce("sum", source, ["@from"], "i64")
    number = ops.iota(Axis("@block", blocks))
    mine = ops.map("eq", [flat, number], "i1")
    counts = ops.reduce(
        "sum", ops.map("where", [mine, step.constant(1), step.constant(0)], "i64"), ["@pair"], "i64"
    )
    sorted_rows = [_in_order(frame, value, rows, source) for value in given]
    out = ops.empty([pair, *order], _element(frame, node))
    whole = blocks - blocks % BLOCKS

    def run(out: Value, block: Size, start: Size) -> tuple[Value, Size]:
        found = code.define(f"tensor.extract {counts.name}[{code.index(block)}] : {counts.type}")
        size = code.define(f"arith.index_cast {found} : i64 to index")
        own = [
            ops.slice(v, {"@pair": (start, size)}) if "@pair" in v.names else v for v in sorted_rows
        ]
        made = _block(frame, node, block, size, own, order)
        return ops.insert(made, out, {"@pair": start}), code.plus(start, size)

    start: Size = 0
    if whole > BLOCKS:
        result, at, carried, begin = code.fresh(), code.fresh(), code.fresh(), code.fresh()
        code.add(
            f"{result}:2 = scf.for {at} = {code.index(0)} to {code.index(whole)} step "
            f"{code.index(BLOCKS)} iter_args({carried} = {out.name}, {begin} = {code.index(0)}) "
            f"-> ({out.type}, index) {{"
        )
        with code.nested():
            inside: Value = ops.tied(Value(carried, out.axes, out.element))
            start = begin
            for n in range(BLOCKS):
                inside, start = run(inside, code.plus(at, n), start)
            code.add(f"scf.yield {inside.name}, {start} : {out.type}, index")
        code.add("}")
        out, start = ops.tied(Value(f"{result}#0", out.axes, out.element)), f"{result}#1"
    else:
        whole = 0
    for n in range(whole, blocks):
        out, start = run(out, n, start)
    return ops.gather(out, "@pair", place)


def _in_order(frame: Frame, value: Value, rows: list[Axis], source: Value) -> Value:
    """The rows of an argument in the order of the blocks; one row may have picked several."""
    ops, step = frame.ops, frame.step
    left = source
    for axis in reversed(rows):
        size = step.number(axis.size)
        if axis.name in value.names:
            place = ops.map("rem", [left, size], "i64")
            value = ops.gather(value, axis.name, place)
        left = ops.map("floordiv", [left, size], "i64")
    return value
