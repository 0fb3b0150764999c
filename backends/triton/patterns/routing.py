"""From experts' logits to the experts of a token and their weights, as one kernel."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group
from backends.pytorch.emit.text import Text, call
from backends.pytorch.emit.values import Value
from backends.triton.families.router import RouterSpec, generate
from backends.triton.patterns.context import Context, packed
from compiler.ir import Node

VIEWS = frozenset({"rename", "flatten", "unflatten", "expand"})


class Other(Exception):
    """It is something else than routing."""


@dataclass
class Reader:
    """Reads a token's weights back to the logits.

    Attributes:
        met: the nodes that the kernel computes.
    """

    context: Context
    met: set[str] = field(default_factory=set)

    def of(self, node: Node, at: int = 0) -> Node:
        return self.context.operand(node, at)

    def take(self, node: Node, op: str, fn: str = "") -> Node:
        """The node is one of the kernel's.

        Raises:
            Other: it is another op.
        """
        if node.op != op or (fn and node.attrs["fn"] != fn):
            raise Other
        self.met.add(node.name)
        return node

    def unviewed(self, node: Node) -> Node:
        """What a view is of; views move nothing here, as experts keep their order."""
        while node.op in VIEWS:
            self.met.add(node.name)
            node = self.of(node)
        return node

    def constant(self, node: Node) -> float:
        if node.op != "constant":
            raise Other
        return float(node.attrs["value"])

    def either(self, node: Node, op: str) -> tuple[Node, Node]:
        """Of two operands the one of that op first."""
        a, b = self.of(node, 0), self.of(node, 1)
        return (a, b) if a.op == op else (b, a)


@dataclass(frozen=True)
class Routing:
    """What was read."""

    spec: RouterSpec
    logits: Node
    pick: Node
    bias: Node | None


def router(context: Context, node: Node) -> Group | None:
    """The weights of the experts that a token picks, with all that leads to them."""
    if node.type.dtype != "f32" or node.op not in ("map", "gather") or len(node.type.dims) != 2:
        return None
    reader = Reader(context)
    try:
        found = _weights(reader, node)
    except (Other, KeyError, ValueError):
        return None
    outputs = {node.name, found.pick.name}
    covered = reader.met | outputs
    if covered & context.taken:
        return None
    if any(not context.users(name) <= covered for name in covered - outputs):
        return None
    order = [n.name for n in context.graph]
    later = order[order.index(node.name) :]
    if any(user not in later for user in context.users(found.pick.name) - covered):
        return None
    operator = generate(found.spec, context.target)
    reads = [found.logits.name, *([found.bias.name] if found.bias else [])]

    def write(body: Body, root: Node, prefix: str) -> Value | None:
        given = packed(body, prefix, *reads)
        if given is None:
            return None
        names = []
        for one in (found.pick, node):
            inner = body.nodes[prefix + one.name]
            name = body.variable(inner)
            body.values[inner.name] = Value(Text(name), one.type.names, one.type.dtype)
            names.append(name)
        body.line(f"{', '.join(names)} = {call(context.use(operator), *given)}", root.span)
        return body.values[prefix + node.name]

    return Group(node.name, frozenset(covered), write, frozenset(reads))


def _weights(reader: Reader, node: Node) -> Routing:
    scale, normalise, eps = 1.0, False, 0.0
    if node.op == "map" and node.attrs["fn"] == "mul":
        reader.take(node, "map")
        number, node = reader.either(node, "constant")
        scale = reader.constant(number)
    if node.op == "map" and node.attrs["fn"] == "div":
        reader.take(node, "map")
        node, total = reader.of(node, 0), reader.of(node, 1)
        normalise = True
        if total.op == "map":
            reader.take(total, "map", "add")
            number, total = reader.either(total, "constant")
            eps = reader.constant(number)
        reader.take(total, "reduce", "sum")
        if reader.of(total) is not node or tuple(total.attrs["over"]) != node.type.names[1:]:
            raise Other
    gather = reader.take(node, "gather")
    table, pick = reader.of(gather, 0), reader.of(gather, 1)
    found = _choice(reader, pick)
    table = reader.unviewed(table)
    weighs_closed = table.op == "map" and table.attrs["fn"] == "where"
    if weighs_closed:
        if table.name not in reader.met:
            raise Other
    elif table.name != found[1]:
        raise Other
    spec = replace(
        found[0].spec,
        normalise=normalise,
        eps=eps,
        scale=scale,
        weigh_closed=weighs_closed,
    )
    return replace(found[0], spec=spec)


def _choice(reader: Reader, pick: Node) -> tuple[Routing, str]:
    """Routing without weights, and the node that holds the scores."""
    context = reader.context
    reader.take(pick, "argtop")
    experts = pick.type.of
    if experts is None or pick.type.dims[0].kind == "plain" or len(pick.type.dims) != 2:
        raise Other
    picks = context.size(pick.type.dims[1])
    source = reader.unviewed(reader.of(pick))
    spec = RouterSpec(experts=context.size(experts), picks=picks)
    grouped = None
    if source.op == "map" and source.attrs["fn"] == "where":
        source, spec = _groups(reader, source, spec)
        grouped = source
    biased, bias = source, None
    if source.op == "map" and source.attrs["fn"] == "add":
        reader.take(source, "map")
        bias, source = reader.either(source, "state")
        if bias.op != "state" or bias.type.dtype != "f32" or len(bias.type.dims) != 1:
            raise Other
    if grouped is not None and biased.name not in reader.met and bias is None:
        reader.met.add(biased.name)
    scores = source
    if scores.op == "softmax":
        reader.take(scores, "softmax")
        if scores.attrs["over"] != scores.type.names[-1]:
            raise Other
        score = "softmax"
    else:
        reader.take(scores, "map", "sigmoid")
        score = "sigmoid"
    logits, dtype = reader.of(scores), "float32"
    if logits.op == "cast" and reader.of(logits).type.dtype == "act":
        reader.met.add(logits.name)
        logits, dtype = reader.of(logits), context.dtype
    if logits.type.dtype not in ("f32", "act") or len(logits.type.dims) != 2:
        raise Other
    spec = replace(spec, score=score, biased=bias is not None, dtype=dtype)
    return Routing(spec, logits, pick, bias), scores.name


def _groups(reader: Reader, where: Node, spec: RouterSpec) -> tuple[Node, RouterSpec]:
    """Scores of the groups that are open, and what that says of them."""
    context = reader.context
    reader.take(where, "map")
    open, members, closed = (reader.of(where, i) for i in range(3))
    reader.take(open, "in_top")
    worth = reader.take(reader.of(open), "reduce")
    count = open.attrs["count"]
    best, values = 1, reader.of(worth)
    if worth.attrs["fn"] == "sum":
        best = context.sizes(values.type.dim(name) for name in worth.attrs["over"])
        reader.take(values, "top")
        values = reader.of(values)
    elif worth.attrs["fn"] != "max":
        raise Other
    if values is not members or members.op != "unflatten" or len(members.attrs["into"]) != 2:
        raise Other
    groups = context.size(members.attrs["into"][0])
    if open.attrs["over"] != members.attrs["into"][0].name:
        raise Other
    opened = count.at(context.program.sizes) if hasattr(count, "at") else int(count)
    spec = replace(
        spec, groups=groups, open_groups=opened, best=best, closed=reader.constant(closed)
    )
    return reader.unviewed(members), spec
