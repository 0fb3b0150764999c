"""The spec table: every op of the IR, one row each.

A row says what an op takes (operands, attributes), what type its result has, what it costs, and
where its reference semantics stand. The verifier, the interpreter, the cost model, the text form
and the docs read this table; an op that is not in it does not exist. To add an op, add a row here,
its type rule in ``compiler/rules.py`` and its meaning in ``compiler/semantics.py``.

A *composite* (attention, a norm) is a name for a few nodes that a backend can run as one. It needs
no semantics of its own: its ``body`` attribute names the body that defines it.

Importing this module does not import torch: ``semantics`` is a name, looked up when something runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from compiler import rules, signatures
from compiler.ir import Dim, DType, Graph, Node, Program, Type
from compiler.rules import Rule, Scope, product
from dsl.extents import Extent

# -- attributes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attr:
    """An attribute: its type in words, and the test that it passes."""

    says: str
    holds: Callable[[Any], bool]
    required: bool = True


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, types) and not (isinstance(v, bool) and bool not in types)


def _all(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, tuple) and all(test(x) for x in v)


def _pair(v: Any) -> bool:
    return _all(_is(str))(v) and len(v) == 2


def _when(v: Any) -> bool:
    return (
        isinstance(v, tuple)
        and len(v) == 3
        and v[0] == "time"
        and v[1] in ("<=", "<", ">", ">=")
        and isinstance(v[2], int)
    )


def optional(attr: Attr) -> Attr:
    return Attr(attr.says, attr.holds, required=False)


def one_of(words: frozenset[str] | set[str]) -> Attr:
    return Attr(f"one of {', '.join(sorted(words))}", lambda v: isinstance(v, str) and v in words)


NAME = Attr("a name", _is(str))
NAMES = Attr("a tuple of names", _all(_is(str)))
NUMBER = Attr("an int, a float or a bool", _is(int, float, bool))
WHOLE = Attr("an int", _is(int))
EXTENT = Attr("an extent", _is(Extent))
EXTENTS = Attr("a tuple of extents", _all(_is(Extent)))
DIM = Attr("a dim", _is(Dim))
DIMS = Attr("a tuple of dims", _all(_is(Dim)))
PAIRS = Attr("a tuple of (body dim, caller dim) names", _all(_pair))
POSITIONS = Attr("a tuple of operands' positions", _all(_is(int)))
WHEN = Attr("a test such as ('time', '<=', 160)", _when)

# -- costs -----------------------------------------------------------------------------------------

# Costs are polynomials in constants and in the lengths of a step (time, history, wanted, rows):
# ``.at(sizes)`` gives the number. An op that runs other bodies has no cost of its own; ``runs``
# says which bodies, and how often.
Cost = Callable[[Node, Graph], Extent]

WIDTHS: Mapping[DType, int] = {"bool": 1, "i64": 8, "act": 2, "f32": 4, "coded": 0}  # by format


def nothing(node: Node, graph: Graph) -> Extent:
    return Extent.of(0)


def per_element(node: Node, graph: Graph) -> Extent:
    return product(node.type.dims)


def per_operand_element(node: Node, graph: Graph) -> Extent:
    return product(graph[node.inputs[0]].type.dims)


def softmax_flops(node: Node, graph: Graph) -> Extent:
    return per_element(node, graph) * 5  # maximum, subtract, exp, sum, divide


def contract_flops(node: Node, graph: Graph) -> Extent:
    """Two per multiply-add, for each point of the union; n operands take n - 1 multiplications."""
    points = product(rules.union(n.type for n in graph.operands(node)))
    return points * max(2, len(node.inputs))


@dataclass(frozen=True)
class Run:
    """A body that a node runs: ``times`` times, with some lengths replaced.

    ``when`` is the test under which it runs, with False where the test must fail; None is always.
    """

    body: str
    child: str = ""
    over: Dim | None = None
    times: Extent = field(default_factory=lambda: Extent.of(1))
    lengths: Mapping[str, Extent] = field(default_factory=dict)
    when: tuple[tuple[str, str, int], bool] | None = None


def _runs_nothing(node: Node, graph: Graph) -> list[Run]:
    return []


def _runs_call(node: Node, graph: Graph) -> list[Run]:
    return [Run(node.attrs["body"], node.attrs["child"])]


def _runs_chain(node: Node, graph: Graph) -> list[Run]:
    index: Dim = node.attrs["index"]
    return [Run(node.attrs["body"], node.attrs["child"], index, times=index.size)]


def _runs_apply(node: Node, graph: Graph) -> list[Run]:
    """The work of all rows, as if one block had them all; each block's weights are read apart."""
    pick = graph[node.inputs[0]].type
    rows = product(pick.dims)
    return [Run(node.attrs["body"], node.attrs["child"], pick.of, lengths={"rows": rows})]


def _runs_branch(node: Node, graph: Graph) -> list[Run]:
    when = node.attrs["when"]
    return [
        Run(node.attrs["then"], when=(when, True)),
        Run(node.attrs["otherwise"], when=(when, False)),
    ]


def _runs_scan(node: Node, graph: Graph) -> list[Run]:
    (time,) = (d.size for d in node.type.dims if d.kind == "time")
    bodies = [node.attrs["body"], *([node.attrs["read"]] if node.attrs.get("read") else [])]
    return [Run(body, times=time) for body in bodies]


def _runs_composite(node: Node, graph: Graph) -> list[Run]:
    return [Run(node.attrs["body"])]


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """One row.

    ``least`` and ``most`` count operands; ``most`` None is any number. ``meaning`` names a function
    of ``compiler/semantics.py``, the op's own name if it is empty. ``view`` ops move no data.
    """

    name: str
    says: str
    least: int
    most: int | None
    rule: Rule
    attrs: Mapping[str, Attr] = field(default_factory=dict)
    meaning: str = ""
    flops: Cost = nothing
    runs: Callable[[Node, Graph], list[Run]] = _runs_nothing
    view: bool = False

    @property
    def semantics(self) -> str:
        return self.meaning or self.name

    @property
    def composite(self) -> bool:
        """A name for the nodes of its ``body``."""
        return self.semantics == "composite"

    @property
    def adjoint(self) -> Callable[..., Any] | None:
        """What emits the gradients of its operands; ``adjoints.NONE`` says why if nothing does."""
        table: Mapping[str, Callable[..., Any]] = import_module("compiler.adjoints").ADJOINTS
        return table.get(self.name)

    def bytes(self, node: Node, graph: Graph, widths: Mapping[DType, int] = WIDTHS) -> Extent:
        """Bytes read and written: each distinct operand once, and the result."""

        def size(node: Node) -> Extent:
            count, coding = product(node.type.dims), node.type.coding
            return coding.total(count) if coding else count * widths[node.type.dtype]

        if self.view or not node.inputs or self.runs is not _runs_nothing:
            return Extent.of(0)
        operands = [graph[name] for name in dict.fromkeys(node.inputs)]
        if self.name == "gather":  # reads the chosen rows of the table, not all of it
            return size(node) * 2 + size(operands[-1])
        if self.name == "cache":  # writes this step's positions; who reads the history pays
            return size(operands[0]) * 2
        read = [size(n) for n in operands if n.op != "constant"]
        return sum(read, size(node))


TABLE: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add a row.

    Raises:
        ValueError: there is one of that name.
    """
    if op.name in TABLE:
        raise ValueError(f"op '{op.name}' is registered twice")
    # Any node may say which values nothing reads after it (compiler/passes/lifetimes.py).
    TABLE[op.name] = op = replace(op, attrs={**op.attrs, "frees": optional(NAMES)})
    return op


def composite(
    name: str,
    says: str,
    most: int | None = None,
    rule: Rule = signatures.composite,
    **attrs: Attr,
) -> Op:
    """Add a composite op: its result is that of its ``body``, run in the same module on the same
    operands; ``attrs`` are what a backend needs to know beside that, and ``rule`` holds these."""
    own = {"body": NAME, **attrs}
    return register(Op(name, says, 1, most, rule, own, "composite", runs=_runs_composite))


CHOICE = {"over": NAME, "to": NAME}
RAN = {"body": NAME, "child": NAME}

# fmt: off
_ROWS = [
    Op("input", "an argument of the body", 0, 0, rules.input, {"name": NAME}),
    Op("position", "positions of the step, or of the history", 0, 0, rules.position),
    Op("param", "a stored parameter", 0, 0, rules.param, {"param": NAME}),
    Op("state", "a stored value that is not trained", 0, 0, rules.param, {"param": NAME}, "param"),
    Op("constant", "a number; a float is weak: it never widens", 0, 0, rules.constant,
       {"value": NUMBER, "name": optional(NAME)}),
    Op("iota", "0, 1, 2, ... along a dim", 0, 0, rules.iota),

    Op("map", "elementwise, dims aligned by name", 1, 3, rules.map,
       {"fn": one_of(rules.FUNCTIONS)}, flops=per_element),
    Op("contract", "product over the union of dims, summed over some; accumulates in f32",
       1, None, rules.contract, {"over": NAMES}, flops=contract_flops),
    Op("reduce", "sum, mean, max or min along dims", 1, 1, rules.reduce,
       {"fn": one_of({"sum", "mean", "max", "min"}), "over": NAMES}, flops=per_operand_element),
    Op("softmax", "along a dim, in f32; a row of -inf gives 0", 1, 1, rules.softmax,
       {"over": NAME}, flops=softmax_flops),
    Op("cast", "another dtype", 1, 1, rules.cast),

    Op("top", "the largest along a dim, descending", 1, 1, rules.top, CHOICE,
       flops=per_operand_element),
    Op("argtop", "their positions; ties go to the lowest", 1, 1, rules.argtop, CHOICE,
       flops=per_operand_element),
    Op("in_top", "whether each is among the largest above -inf; ties go to the lowest", 1, 1,
       rules.in_top, {"over": NAME, "count": EXTENT}, flops=per_operand_element),
    Op("gather", "rows of a table, by a typed index", 2, 2, rules.gather, {"dim": NAME}),

    Op("flatten", "dims joined row-major into one", 1, 1, rules.flatten,
       {"dims": NAMES, "into": DIM}, view=True),
    Op("unflatten", "a dim split row-major", 1, 1, rules.unflatten,
       {"dim": NAME, "into": DIMS}, view=True),
    Op("part", "one summand of a sum dim", 1, 1, rules.part,
       {"dim": NAME, "part": NAME}, view=True),
    Op("select", "one position of a dim", 1, 1, rules.select,
       {"dim": NAME, "at": WHOLE}, view=True),
    Op("rename", "a dim under another name", 1, 1, rules.rename,
       {"dim": NAME, "to": DIM}, view=True),
    Op("expand", "the same along new dims", 1, 1, rules.expand, {"dims": DIMS}, view=True),
    Op("select_rows", "the positions whose result is wanted", 1, 1, rules.select_rows, view=True),
    Op("concat", "parts stacked along a sum dim", 1, None, rules.concat, {"dim": DIM}),
    Op("stack", "values stacked along a new dim", 1, None, rules.stack, {"dim": DIM}),

    Op("cache", "appended along time, read along history", 1, 1, rules.cache,
       {"name": NAME, "last": optional(EXTENTS)}),
    Op("shift", "a history read some tokens before each of the step; 0 before the first", 1, 1,
       rules.shift, {"history": NAME, "index": optional(NAME), "sign": WHOLE, "offset": EXTENT,
        "last": optional(EXTENTS)}),
    Op("scan", "state = body(state, operands...) for each token, kept between steps; gives the "
       "states, or what `read` makes of each", 1, None, signatures.scan,
       {"name": NAME, "body": NAME, "given": POSITIONS, "read": optional(NAME),
        "asked": optional(POSITIONS), "linear": optional(NAMES)}, runs=_runs_scan),
    Op("call", "a child's body", 0, None, signatures.call, {**RAN, "dims": PAIRS},
       runs=_runs_call),
    Op("chain", "x = body(x, extras...) for each number of a loop", 1, None, signatures.chain,
       {**RAN, "index": DIM, "dims": optional(PAIRS)}, runs=_runs_chain),
    Op("apply", "each row through the blocks it picked, once per distinct block", 1, None,
       signatures.apply, {**RAN, "over": NAME, "rows": NAMES, "dims": PAIRS}, runs=_runs_apply),
    Op("branch", "one of two bodies that compute the same", 0, None, signatures.branch,
       {"when": WHEN, "then": NAME, "otherwise": NAME}, runs=_runs_branch),
]
# fmt: on

for _row in _ROWS:
    register(_row)


# -- questions that many passes ask ----------------------------------------------------------------


def op(node: Node) -> Op:
    """The node's row.

    Raises:
        KeyError: there is no such op.
    """
    return TABLE[node.op]


def flops(node: Node, graph: Graph) -> Extent:
    """Floating-point operations of the node itself, without those of the bodies it runs."""
    return op(node).flops(node, graph)


def bytes(node: Node, graph: Graph, widths: Mapping[DType, int] = WIDTHS) -> Extent:
    """Bytes that the node itself reads and writes; ``widths`` are bytes per element."""
    return op(node).bytes(node, graph, widths)


def runs(node: Node, graph: Graph) -> list[Run]:
    """The bodies that the node runs."""
    return op(node).runs(node, graph)


def inferred(node: Node, graph: Graph, scope: Scope) -> Type:
    """The type that the node's rule asks for; the order of its dims means nothing.

    Raises:
        RuleError: operands or attributes break the rule.
    """
    return op(node).rule(node, graph.operands(node), scope)


def total_flops(program: Program, body: str, sizes: Mapping[str, int]) -> int:
    """All the work of one run of a body, bodies that it runs included.

    Args:
        sizes: constants, and the lengths ``time``, ``history``, ``wanted`` of the step.
    """
    graph = program.bodies[body]
    count = 0
    for node in graph:
        count += flops(node, graph).at(sizes)
        for run in runs(node, graph):
            if run.when is not None and holds(run.when[0], sizes) is not run.when[1]:
                continue
            inner = {**sizes, **{k: v.at(sizes) for k, v in run.lengths.items()}}
            count += run.times.at(sizes) * total_flops(program, run.body, inner)
    return count


def holds(when: tuple[str, str, int], sizes: Mapping[str, int]) -> bool:
    """Whether a branch's test holds at these lengths."""
    length, relation, number = when
    value = sizes[length]
    if relation == "<=":
        return value <= number
    if relation == "<":
        return value < number
    return value > number if relation == ">" else value >= number


def dims_of(node: Node) -> Iterator[Dim]:
    """Every dim that a node's type or attributes mention, parts of sums and products included."""
    yield from with_parts(node.type.dims)
    if node.type.of:
        yield from with_parts([node.type.of])
    yield from with_parts(_mentioned(node.attrs.values()))


def with_parts(dims: Iterable[Dim]) -> Iterator[Dim]:
    """These dims, each before its parts."""
    for dim in dims:
        yield dim
        yield from with_parts(dim.parts)


def _mentioned(values: Iterable[Any]) -> Iterator[Dim]:
    for value in values:
        if isinstance(value, Dim):
            yield value
        elif isinstance(value, tuple):
            yield from _mentioned(value)


def scopes(program: Program) -> Iterator[tuple[Scope, Graph]]:
    """Every body that an entry reaches, with each module it runs in, callers first."""
    todo = [(Scope(program, program.root), entry.body) for entry in program.entries.values()]
    seen: set[tuple[str, str]] = set()
    while todo:
        scope, name = todo.pop(0)
        if (scope.module, name) in seen:
            continue
        seen.add((scope.module, name))
        graph = scope.body(name)
        yield scope, graph
        for node in graph:
            if node.op in TABLE:
                ran = runs(node, graph)
                todo += [(scope.inside(run.child, run.over), run.body) for run in ran]


for _more in ("spec_composites", "bundles", "externs", "spec_coded"):  # in files of their own
    import_module(f"compiler.{_more}")
