"""How each op of the graph is written with the operations of ``linalg.py``."""

from __future__ import annotations

import math

from backends.mlir import packed
from backends.mlir.coding import packs
from backends.mlir.lower import Frame, lowers
from backends.mlir.step import INNER, LANES, OUTER
from backends.mlir.values import BATCH, Axis, Element, Size, Value, union
from compiler.ir import Dim, Node
from compiler.tensors import Place

END = INNER.format("")

# -- sources ---------------------------------------------------------------------------------------


@lowers("input")
def input(frame: Frame, node: Node, args: list[Value]) -> Value:
    return frame.arguments[node.attrs["name"]]


@lowers("position")
def position(frame: Frame, node: Node, args: list[Value]) -> Value:
    (dim,) = node.type.dims
    if dim.kind == "history":
        return frame.step.history_position.renamed({"@history": dim.name})
    return frame.step.position.renamed({"@time": dim.name})


@lowers("param", "state")
def param(frame: Frame, node: Node, args: list[Value]) -> Value:
    path = _path(frame.place, node.attrs["param"])
    pattern = frame.step.weights.patterns[path, frame.place.ranges]
    is_factor = _is_factor(frame, node)
    if pattern.coding is not None:
        frame.check_codes(node, pattern.coding)
        is_factor = is_factor and packs(pattern.coding, pattern.shape, LANES)
    found = frame.step.weight(path, frame.place.ranges, frame.index, is_factor)
    names = dict(zip(pattern.dims, node.type.names, strict=True))
    names |= {f.format(a): f.format(b) for a, b in names.items() for f in (OUTER, INNER)}
    return found.renamed(names)


def _is_factor(frame: Frame, node: Node) -> bool:
    """Whether a matrix is nothing but a factor of products of two that sum over its columns."""
    stored = node.type.dtype in ("act", "coded")
    if len(node.type.dims) != 2 or not stored or not frame.ops.loops:
        return False
    rows, columns = node.type.dims
    if frame.graph.output == node.name or rows.kind != columns.kind:
        return False
    size = frame.size(rows)
    return (
        isinstance(size, int)
        and size % LANES == 0
        and all(
            user.op in ("contract", "scaled_contract")
            and len(user.inputs) == 2
            and user.inputs.count(node.name) == 1
            and tuple(user.attrs["over"]) == (columns.name,)
            and all(
                rows.name not in other.type.names and columns.name in other.type.names
                for other in frame.graph.operands(user)
                if other.name != node.name
            )
            for user in frame.graph.users(node.name)
        )
    )


def _path(place: Place, name: str) -> str:
    return f"{place.path}.{name}" if place.path else name


@lowers("constant")
def constant(frame: Frame, node: Node, args: list[Value]) -> Value:
    return Value("", (), frame.element(node), node.attrs["value"])


@lowers("iota")
def iota(frame: Frame, node: Node, args: list[Value]) -> Value:
    return frame.ops.iota(frame.axis(node.type.dims[0]))


# -- arithmetic ------------------------------------------------------------------------------------


@lowers("map")
def map(frame: Frame, node: Node, args: list[Value]) -> Value:
    return frame.ops.map(node.attrs["fn"], frame.together(args), frame.element(node))


@lowers("cast")
def cast(frame: Frame, node: Node, args: list[Value]) -> Value:
    # A value that is not rounded stays in f32, whatever its dtype is called.
    return frame.ops.cast(args[0], frame.element(node)) if node.type.dtype != "act" else args[0]


@lowers("contract", "scaled_contract")
def contract(frame: Frame, node: Node, args: list[Value]) -> Value:
    """Two factors at a time; a dim is summed with the last factor that has it."""
    ops = frame.ops
    over = set(node.attrs["over"])
    values = frame.together([_masked(frame, v, over, 0.0) for v in args])
    element = frame.stored(node.type.dtype) if node.rounds else frame.element(node)
    if node.type.dtype == "i64":
        found = values[0]
        for value in values[1:]:
            found = ops.map("mul", [found, value], "i64")
        return ops.reduce("sum", found, [n for n in found.names if n in over], "i64")
    found = values[0]
    if len(values) == 1:
        return ops.reduce("sum", found, [n for n in found.names if n in over], element)
    for number, value in enumerate(values[1:], start=2):
        later = {n for v in values[number:] for n in v.names}
        left = [a for a in union([found, value]) if a.name not in over - later]
        found = _product(frame, found, value, left, element if number == len(values) else "f32")
    whole = [n.removesuffix(END) for n in found.names if n.endswith(END)]
    for name in whole:
        found = ops.merge(found, [OUTER.format(name), INNER.format(name)], name)
    return found


def _product(frame: Frame, a: Value, b: Value, left: list[Axis], element: Element) -> Value:
    """A product of matrices, one for each place along the axes that both keep: these in front, then
    what ``a`` keeps, which has the rows, then what ``b`` keeps."""
    if not _runs_over_rows(frame, a) and _runs_over_rows(frame, b):
        a, b = b, a
    names = {axis.name for axis in left}
    both = [n for n in a.names if n in b.names and n in names]
    order = [*both, *(n for n in (*a.names, *b.names) if n in names and n not in both)]
    if both and frame.step.rows != 1:
        a, b = (
            frame.ops.transpose(v, [*both, *(n for n in v.names if n not in both)]) for v in (a, b)
        )
    sizes = {axis.name: axis for axis in left}
    out = [sizes[n] for n in order]
    if b.names[-1:] and b.names[-1].endswith(END):
        return packed.product(frame.ops, a, b, out, element)
    return frame.ops.contract(a, b, out, element)


def _runs_over_rows(frame: Frame, value: Value) -> bool:
    return any(frame.kinds.get(n) in ("time", "rows") for n in value.names)


def _masked(frame: Frame, value: Value, over: set[str], neutral: float) -> Value:
    """Positions of the history that a sequence does not have count as ``neutral``."""
    history = frame.history_of(value)
    valid = frame.step.valid
    if history is None or history not in over or valid is None:
        return value
    seen = valid.renamed({"@history": history})
    other = frame.step.constant(neutral, value.element)
    return frame.ops.map("where", [seen, frame.batched(value), other], value.element)


@lowers("reduce")
def reduce(frame: Frame, node: Node, args: list[Value]) -> Value:
    fn, over = node.attrs["fn"], tuple(node.attrs["over"])
    value = args[0]
    if not over:
        return value
    if any(frame.kinds.get(n) == "time" for n in over):
        raise frame.unsupported(node, "it runs over the tokens of a step")
    history = frame.history_of(value)
    if fn == "mean" and history in over:
        raise frame.unsupported(node, "a mean over a history")
    neutral = {"sum": 0.0, "mean": 0.0, "max": -math.inf, "min": math.inf}[fn]
    value = _masked(frame, value, set(over), neutral)
    element = frame.element(node)
    if fn != "mean":
        return frame.ops.reduce(fn, value, over, element)
    total = frame.ops.reduce("sum", value, over, "f32")
    count = frame.code.product([value.axis(n).size for n in over])
    assert isinstance(count, int)
    return frame.ops.map("div", [total, frame.step.constant(float(count), "f32")], element)


@lowers("softmax")
def softmax(frame: Frame, node: Node, args: list[Value]) -> Value:
    """A row of -inf gives 0."""
    ops, over = frame.ops, node.attrs["over"]
    value = _masked(frame, args[0], {over}, -math.inf)
    zero, least = frame.step.constant(0.0, "f32"), frame.step.constant(-math.inf, "f32")
    most = ops.reduce("max", value, [over], "f32")
    nothing = ops.map("eq", [most, least], "i1")
    most = ops.map("where", [nothing, zero, most], "f32")
    grown = ops.map("exp", [ops.map("sub", [value, most], "f32")], "f32")
    total = ops.reduce("sum", grown, [over], "f32")
    total = ops.map("where", [nothing, frame.step.constant(1.0, "f32"), total], "f32")
    return ops.map("div", [grown, total], "f32")


# -- choosing --------------------------------------------------------------------------------------


@lowers("top")
def top(frame: Frame, node: Node, args: list[Value]) -> Value:
    return _chosen(frame, node, args[0], args[0])


@lowers("argtop")
def argtop(frame: Frame, node: Node, args: list[Value]) -> Value:
    return _chosen(frame, node, args[0], frame.ops.iota(args[0].axis(node.attrs["over"])))


def _chosen(frame: Frame, node: Node, value: Value, of: Value) -> Value:
    """``of`` where a value's rank is 0, 1, 2, ...: of the elements of a rank there is one."""
    ops, over = frame.ops, node.attrs["over"]
    if over == frame.history_of(value):
        raise frame.unsupported(node, "a choice among the positions of a history")
    to = frame.axis(node.type.dim(node.attrs["to"]))
    rank = ops.rank(value, over)
    here = ops.map("eq", [rank, ops.iota(to)], "i1")
    zero = frame.step.constant(0, of.element)
    return ops.reduce("sum", ops.map("where", [here, of, zero], of.element), [over], of.element)


@lowers("in_top")
def in_top(frame: Frame, node: Node, args: list[Value]) -> Value:
    ops = frame.ops
    # Rows of a history that a sequence does not have take no place.
    value = _masked(frame, args[0], {node.attrs["over"]}, -math.inf)
    count = node.attrs["count"].at(frame.step.program.sizes)
    rank = ops.rank(value, node.attrs["over"])
    among = ops.map("lt", [rank, frame.step.constant(count)], "i1")
    least = frame.step.constant(-math.inf, "f32")
    return ops.map("and", [among, ops.map("gt", [value, least], "i1")], "i1")


@lowers("gather")
def gather(frame: Frame, node: Node, args: list[Value]) -> Value:
    table, index = frame.together(args)
    return frame.ops.gather(table, node.attrs["dim"], index)


# -- views -----------------------------------------------------------------------------------------


@lowers("flatten")
def flatten(frame: Frame, node: Node, args: list[Value]) -> Value:
    return frame.ops.merge(args[0], node.attrs["dims"], node.attrs["into"].name)


@lowers("unflatten")
def unflatten(frame: Frame, node: Node, args: list[Value]) -> Value:
    into = [frame.axis(dim) for dim in node.attrs["into"]]
    return frame.ops.split(args[0], node.attrs["dim"], into)


@lowers("part")
def part(frame: Frame, node: Node, args: list[Value]) -> Value:
    dim = frame.graph.operands(node)[0].type.dim(node.attrs["dim"])
    name = node.attrs["part"]
    start = dim.offset(name).at(frame.step.program.sizes)
    size = next(frame.size(p) for p in dim.parts if p.name == name)
    return frame.ops.slice(args[0], {dim.name: (start, size)}).renamed({dim.name: name})


@lowers("select")
def select(frame: Frame, node: Node, args: list[Value]) -> Value:
    return frame.ops.slice(args[0], {node.attrs["dim"]: (node.attrs["at"], 1)}, drop=True)


@lowers("rename")
def rename(frame: Frame, node: Node, args: list[Value]) -> Value:
    return args[0].renamed({node.attrs["dim"]: node.attrs["to"].name})


@lowers("expand")
def expand(frame: Frame, node: Node, args: list[Value]) -> Value:
    new = [frame.axis(dim) for dim in node.attrs["dims"]]
    return frame.ops.full(args[0], [*args[0].axes, *new])


@lowers("concat")
def concat(frame: Frame, node: Node, args: list[Value]) -> Value:
    dim: Dim = node.attrs["dim"]
    element = frame.element(node)
    values = [
        frame.ops.cast(v, element).renamed({p.name: dim.name})
        for v, p in zip(frame.together(args), dim.parts, strict=True)
    ]
    order = [a.name for a in union(values) if a.name != dim.name]
    ordered = [frame.ops.transpose(v, [*order, dim.name]) for v in values]
    return frame.ops.concat(ordered, dim.name)


@lowers("stack")
def stack(frame: Frame, node: Node, args: list[Value]) -> Value:
    ops, axis = frame.ops, frame.axis(node.attrs["dim"])
    values, element = frame.together(args), frame.element(node)
    at, found = ops.iota(axis), values[0]
    for number, value in enumerate(values[1:], start=1):
        here = ops.map("eq", [at, frame.step.constant(number)], "i1")
        found = ops.map("where", [here, value, found], element)
    rest = [a for a in union(values) if a.name != axis.name]
    return ops.full(ops.cast(found, element), [*rest, axis])


@lowers("select_rows")
def select_rows(frame: Frame, node: Node, args: list[Value]) -> Value:
    time = frame.time_of(args[0])
    assert time is not None
    (rows,) = (d.name for d in node.type.dims if d.kind == "rows")
    wanted = frame.step.rows_wanted
    if wanted is None:
        return args[0].renamed({time: rows})
    return frame.ops.gather(args[0], time, wanted.renamed({"@wanted": rows}))


# -- histories -------------------------------------------------------------------------------------


@lowers("cache")
def cache(frame: Frame, node: Node, args: list[Value]) -> Value:
    """This step's rows behind those of the cache: a history is [batch, held + time, ...]."""
    ops, step = frame.ops, frame.step
    (history,) = (d.name for d in node.type.dims if d.kind == "history")
    value = frame.batched(args[0])
    time = frame.time_of(value)
    assert time is not None
    key = (_path(frame.place, node.attrs["name"]), frame.place.ranges)
    rest = [n for n in node.type.names if n != history]
    new = ops.transpose(value, [BATCH, time, *rest])
    new = ops.cast(new, frame.stored(node.type.dtype))
    if not step.caches:  # a step of its own
        return new.renamed({time: history})
    held = step.caches[key]
    arrays: dict[str, tuple[Size, Size]] = {
        f"@{n}": (at, 1) for n, at in enumerate(frame.index) if at is not None
    }
    old = ops.slice(held, arrays, drop=True) if arrays else held
    old = old.renamed(dict(zip(old.names, (BATCH, "@capacity", *rest), strict=True)))
    starts: dict[str, Size] = {name: at for name, (at, _) in arrays.items()}
    into = step.kept[key]
    own = into.names[len(frame.index) :]
    rows = new.renamed(dict(zip(new.names, own, strict=True)))
    step.cached(key, rows, starts)
    return _appended(frame, old, new.renamed({time: history}), history)


def _appended(frame: Frame, old: Value, new: Value, history: str) -> Value:
    """What is held of a cache, and the step's rows behind it."""
    ops, step = frame.ops, frame.step
    at = ops.iota(Axis(history, step.history))
    later = ops.map("sub", [at, step.number(step.held)], "i64")
    before = ops.map("lt", [later, step.constant(0)], "i1")
    # A cache has room for the step's rows: what is read behind those it holds is not chosen.
    first = ops.slice(old, {"@capacity": (0, step.history)}).renamed({"@capacity": history})
    if isinstance(step.time, int) and step.time == 1:
        second = ops.slice(new, {history: (0, 1)}, drop=True)
    else:
        last = ops.map("sub", [step.number(step.time), step.constant(1)], "i64")
        place = ops.map("max", [ops.map("min", [later, last], "i64"), step.constant(0)], "i64")
        second = ops.gather(new.renamed({history: "@new"}), "@new", place)
    return ops.map("where", [before, first, second], new.element)


@lowers("shift")
def shift(frame: Frame, node: Node, args: list[Value]) -> Value:
    a, ops, step = node.attrs, frame.ops, frame.step
    (time,) = (d.name for d in node.type.dims if d.kind == "time")
    at = frame.batched(step.position.renamed({"@time": time}))
    offset = a["offset"].at(step.program.sizes)
    at = ops.map("add", [at, step.constant(offset)], "i64")
    if a.get("index"):
        places = ops.iota(frame.axis(node.type.dim(a["index"])))
        at = ops.map("add" if a["sign"] > 0 else "sub", [at, places], "i64")
    # A position of the sequence is further back in the history if the sequence is a short one.
    apart = ops.map("sub", [step.number(step.held), step.past], "i64")
    old = ops.map("lt", [at, step.past], "i1")
    row = ops.map("where", [old, at, ops.map("add", [at, apart], "i64")], "i64")
    last = ops.map("sub", [step.number(step.history), step.constant(1)], "i64")
    row = ops.map("max", [ops.map("min", [row, last], "i64"), step.constant(0)], "i64")
    found = ops.gather(args[0], a["history"], row)
    before = ops.map("lt", [at, step.constant(0)], "i1")
    nothing = step.constant(0, found.element)
    return ops.map("where", [before, nothing, found], found.element)
