"""What a pattern asks of the body that it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group
from backends.pytorch.emit.text import Text, call
from backends.pytorch.emit.values import Value
from backends.triton.kernel import Operator
from backends.triton.own import Extern
from backends.triton.targets import Target
from compiler.ir import Dim, Graph, Node, Program

DTYPES = {"f32": "float32", "i64": "int64", "bool": "bool"}


@dataclass(frozen=True)
class Experts:
    """The body is a block of an array, and its rows are sorted by which block they are for."""

    count: int
    child: str


@dataclass
class Context:
    """A body, and the kernels that are generated for it.

    Attributes:
        dtype: of activations, by torch's name.
        use: makes an operator part of ``kernels.py``; returns what a call of it begins with.
        name: a name for an operator that is what the second argument says, close to the first.
        groups: the groups of a body.
        blocks: the bodies of blocks that data choose, each with its array; None where it has
            several.
        taken: nodes that no group may hold.
        own: makes a function of the user's part of ``kernels.py``; returns what a call begins with.
    """

    program: Program
    graph: Graph
    target: Target
    dtype: str
    use: Callable[[Operator], str]
    name: Callable[[str, object], str]
    groups: Callable[[Context], Iterator[Group]]
    blocks: Mapping[str, Experts | None]
    taken: frozenset[str] = frozenset()
    experts: Experts | None = None
    own: Callable[[Extern, Node], str] = lambda found, node: ""
    _users: dict[str, set[str]] = field(default_factory=dict)

    def within(self, graph: Graph) -> Context:
        """The same, of another body."""
        return replace(self, graph=graph, _users={})

    def size(self, dim: Dim) -> int:
        """A dim's length, which has to be known before the model runs."""
        return self.program.size(dim)

    def fixed(self, dim: Dim) -> bool:
        """Is its length known before the model runs?"""
        return dim.kind == "plain"

    def sizes(self, dims: Iterable[Dim]) -> int:
        product = 1
        for dim in dims:
            product *= self.size(dim)
        return product

    def dtype_of(self, node: Node) -> str:
        """By torch's name."""
        return DTYPES.get(node.type.dtype, self.dtype)

    def operand(self, node: Node, at: int) -> Node:
        return self.graph[node.inputs[at]]

    def users(self, name: str) -> set[str]:
        """The names of the nodes that read it; ``None`` stands for the body's caller."""
        if not self._users:
            for node in self.graph:
                for operand in node.inputs:
                    self._users.setdefault(operand, set()).add(node.name)
            self._users.setdefault(self.graph.output, set()).add("")
        return self._users.get(name, set())

    def inner(self, names: Iterable[str], root: str) -> bool:
        """Does nothing but these nodes read them, but for the root?"""
        covered = {*names, root}
        return all(self.users(n) <= covered for n in covered - {root}) and not covered & self.taken


def calls(
    context: Context,
    root: Node,
    covered: Iterable[str],
    arguments: Callable[[Body, str], list[str] | None],
    operator: Operator,
    reads: Iterable[str] | None = None,
) -> Group:
    """A group whose root is what one operator returns, packed, in the root's order of dims.

    Args:
        arguments: of the call, as expressions; None where it does not fit.
    """

    def write(body: Body, node: Node, prefix: str) -> Value | None:
        given = arguments(body, prefix)
        if given is None:
            return None
        function = context.use(operator)
        return Value(Text(str(call(function, *given))), node.type.names, node.type.dtype)

    read = None if reads is None else frozenset(reads)
    return Group(root.name, frozenset({root.name, *covered}), write, read)


def packed(body: Body, prefix: str, *names: str) -> list[str] | None:
    """The values of nodes, if they are tensors whose axes are as their types say; else None."""
    values = [(body.values[prefix + name], body.nodes[prefix + name]) for name in names]
    if any(value.number is not None or value.axes != n.type.names for value, n in values):
        return None
    return [str(value) for value, _ in values]
