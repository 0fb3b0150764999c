"""Chains of contractions: what may be multiplied in another order than the source wrote.

A contraction whose operand is itself a contraction, free of rounding and read nowhere else, is a
product of more factors: ``q * (W * c)`` is ``q * W * c``, summed over both sums' dims. A chain is
such a product with all its factors (leaves); a tree says in which pairs they are multiplied.

What stops a chain is what the author of the model can see: a plain name (it marks a rounding), a
value that is read twice, and whatever is no product (a norm, a cache, a call). A cast of a ``let``
to f32 is looked through, since the value it widens was never rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

from compiler.cost import WIDTH, is_square
from compiler.ir import Dim, DType, Graph, Node, Type

Tree: TypeAlias = "int | tuple[Tree, Tree]"

LONGEST = 6  # 945 trees; chains are at most about four long, and longer ones keep their order
WEIGHT_OPS = frozenset({"param", "state"})
FREE_VIEWS = frozenset({"unflatten", "flatten", "part", "select", "rename"})


@dataclass(frozen=True)
class Leaf:
    """One factor. ``read`` is the operand as the source reads it, ``value`` the same before a
    widening cast; ``renamed`` gives summed dims whose names are taken further out new ones."""

    read: str
    value: str
    type: Type  # of value, after renaming
    weight: bool
    renamed: tuple[tuple[str, Dim], ...] = ()


@dataclass(frozen=True)
class Chain:
    """A product of leaves. ``contraction`` is the outermost contraction; ``root`` is the value the
    chain gives: that contraction, or the cast that alone reads it. ``inlined`` are the nodes that
    go; ``lets`` says which of them is the product of which leaves."""

    root: str
    contraction: str
    leaves: tuple[Leaf, ...]
    result: Type
    middle: DType  # dtype of what lies between leaves and result
    inlined: frozenset[str]
    lets: Mapping[frozenset[int], str]


@dataclass(frozen=True)
class Step:
    """One pairwise contraction of a tree."""

    leaves: frozenset[int]
    dims: tuple[Dim, ...]  # of the result
    over: tuple[str, ...]


def weights(graph: Graph) -> set[str]:
    """Values computed from parameters and constants alone: the same for every token."""
    found: set[str] = set()
    fixed: set[str] = set()
    for node in graph:
        if node.op in WEIGHT_OPS:
            found.add(node.name)
        elif node.op in ("constant", "iota"):
            fixed.add(node.name)
        elif node.inputs and found.union(fixed).issuperset(node.inputs) and node.op != "call":
            (found if found.intersection(node.inputs) else fixed).add(node.name)
    return found


def reads(graph: Graph) -> dict[str, int]:
    """How often each value is read; the body's result counts."""
    count = {name: graph.nx.out_degree(name) for name in graph.nx}
    count[graph.output] += 1
    return count


# -- finding -------------------------------------------------------------------------------------


def find(graph: Graph) -> list[Chain]:
    """The body's chains of three factors or more, in order."""
    count, weight = reads(graph), weights(graph)
    taken: set[str] = set()
    chains: list[Chain] = []
    for node in reversed(list(graph)):  # outermost first: what it inlines is no chain of its own
        if node.op == "contract" and node.name not in taken:
            chain = _chain(graph, node, count, weight)
            taken |= chain.inlined
            if 3 <= len(chain.leaves) <= LONGEST:
                chains.append(chain)
    return chains[::-1]


def _chain(graph: Graph, node: Node, count: Mapping[str, int], weight: set[str]) -> Chain:
    names = {dim.name for operand in graph.operands(node) for dim in operand.type.dims}
    leaves: list[Leaf] = []
    inlined: set[str] = set()
    lets: dict[frozenset[int], str] = {}
    middles: set[DType] = set()

    def collect(product: Node, renamed: Mapping[str, Dim]) -> frozenset[int]:
        here: frozenset[int] = frozenset()
        for read in product.inputs:
            path = _let(graph, read, count)
            if not path:
                value = _unwidened(graph, read)
                leaf = Leaf(read, value, graph[value].type, value in weight)
                leaves.append(_rename(leaf, renamed))
                here |= {len(leaves) - 1}
                continue
            inner = path[-1]
            # A dim that the inner product sums may share its name with one further out.
            fresh = {
                dim.name: dim
                if dim.name not in names
                else replace(dim, name=_fresh(dim.name, names), form="atom", parts=())
                for dim in _summed(graph, inner)
            }
            names.update(dim.name for dim in fresh.values())
            outer = {k: v for k, v in renamed.items() if k not in fresh}
            below = collect(inner, {**outer, **fresh})
            lets[below] = inner.name
            middles.update(passed.type.dtype for passed in path)
            inlined.update(passed.name for passed in path)
            here |= below
        return here

    collect(node, {})
    root = node
    users = graph.users(node.name)
    if count[node.name] == 1 and len(users) == 1 and _rounds_down(users[0]) and not node.rounds:
        root = users[0]
    return Chain(
        root.name,
        node.name,
        tuple(leaves),
        root.type,
        "act" if "act" in (middles or {root.type.dtype}) else "f32",
        frozenset(inlined | ({node.name} if root is not node else set())),
        lets,
    )


def _let(graph: Graph, name: str, count: Mapping[str, int]) -> list[Node]:
    """From operand ``name`` to the contraction that it may be replaced by, casts between; or []."""
    path: list[Node] = []
    node = graph[name]
    while not node.rounds and count[node.name] == 1:
        path.append(node)
        if node.op == "contract":
            return path
        if node.op != "cast" or not (_is_float(node) and _is_float(graph[node.inputs[0]])):
            break
        node = graph[node.inputs[0]]
    return []


def _summed(graph: Graph, node: Node) -> list[Dim]:
    dims = {dim.name: dim for operand in graph.operands(node) for dim in operand.type.dims}
    return [dims[name] for name in node.attrs["over"]]


def _is_float(node: Node) -> bool:
    return node.type.dtype in ("act", "f32")


def _rounds_down(node: Node) -> bool:
    return node.op == "cast" and node.type.dtype == "act"


def _unwidened(graph: Graph, name: str) -> str:
    node = graph[name]
    if node.op == "cast" and node.type.dtype == "f32" and not node.rounds:
        source = graph[node.inputs[0]]
        return source.name if source.type.dtype == "act" else name
    return name


def _fresh(name: str, taken: set[str]) -> str:
    number = 2
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def _rename(leaf: Leaf, renamed: Mapping[str, Dim]) -> Leaf:
    new = {
        dim.name: renamed[dim.name]
        for dim in leaf.type.dims
        if dim.name in renamed and renamed[dim.name].name != dim.name
    }
    if not new:
        return leaf
    dims = tuple(new.get(dim.name, dim) for dim in leaf.type.dims)
    return replace(leaf, type=replace(leaf.type, dims=dims), renamed=tuple(new.items()))


# -- orders --------------------------------------------------------------------------------------


def trees(leaves: tuple[int, ...]) -> Iterator[Tree]:
    """Every way to multiply the leaves in pairs."""
    if len(leaves) == 1:
        yield leaves[0]
        return
    first, *rest = leaves
    for mask in range(2 ** len(rest) - 1):  # which of the rest stand on the first one's side
        left = (first, *(leaf for i, leaf in enumerate(rest) if mask >> i & 1))
        right = tuple(leaf for i, leaf in enumerate(rest) if not mask >> i & 1)
        for a in trees(left):
            for b in trees(right):
                yield (a, b)


def members(tree: Tree) -> frozenset[int]:
    return frozenset({tree}) if isinstance(tree, int) else members(tree[0]) | members(tree[1])


def joins(tree: Tree) -> Iterator[tuple[Tree, Tree]]:
    """The pairs that are multiplied, inner ones first."""
    if not isinstance(tree, int):
        yield from joins(tree[0])
        yield from joins(tree[1])
        yield tree


def allowed(chain: Chain, tree: Tree) -> bool:
    """Two weights are never multiplied: their product is bigger than both, or has to be made again
    for every step, while a vector passes through one after the other."""

    def only_weights(part: Tree) -> bool:
        return all(chain.leaves[i].weight for i in members(part))

    return only_weights(tree) or not any(
        only_weights(left) and only_weights(right) for left, right in joins(tree)
    )


def step(chain: Chain, left: Tree, right: Tree) -> Step:
    """The contraction of two parts."""
    parts = members(left), members(right)
    dims = {dim.name: dim for part in parts for dim in dims_of(chain, part)}
    both = parts[0] | parts[1]
    made = dims_of(chain, both)
    kept = {dim.name for dim in made}
    over = tuple(name for name in dims if name not in kept)
    return Step(both, chain.result.dims if len(both) == len(chain.leaves) else made, over)


def dims_of(chain: Chain, part: frozenset[int]) -> tuple[Dim, ...]:
    """The dims of a product of leaves: what neither another leaf nor the result has is summed."""
    inside = {dim.name: dim for i in sorted(part) for dim in chain.leaves[i].type.dims}
    if len(part) == 1:
        return tuple(inside.values())
    outside = set(chain.result.names)
    for i, leaf in enumerate(chain.leaves):
        if i not in part:
            outside.update(leaf.type.names)
    kept = [dim for name, dim in inside.items() if name in outside]
    # Lifted dims come first, then the order of the source (language.md: one canonical layout).
    kept.sort(key=lambda dim: dim.kind not in ("time", "rows"))
    return tuple(kept)


# -- cost ----------------------------------------------------------------------------------------


class Prices:
    """FLOPs and bytes of a chain's trees, at given lengths.

    Every contraction reads its operands and writes its result, but for scores and probabilities
    (leaves and results over time x history), which stay on the chip; a product of queries with the
    latent before it has met the weights would not fit there. What trees share is priced once.
    """

    def __init__(self, chain: Chain, at: Mapping[str, int]):
        self.chain = chain
        self.sizes = {dim.name: dim.size.at(at) for leaf in chain.leaves for dim in leaf.type.dims}
        self._parts: dict[frozenset[int], tuple[frozenset[str], int]] = {}
        self._joins: dict[tuple[frozenset[int], frozenset[int]], tuple[int, int]] = {}

    def __call__(self, tree: Tree) -> tuple[int, int]:
        flops = moved = 0
        todo = [tree]
        while todo:
            part = todo.pop()
            if not isinstance(part, int):
                left, right = part
                more = self._join(members(left), members(right))
                flops, moved = flops + more[0], moved + more[1]
                todo += part
        return flops, moved

    def _join(self, left: frozenset[int], right: frozenset[int]) -> tuple[int, int]:
        if (left, right) not in self._joins:
            (a, read), (b, read_too), (_, written) = map(self._part, (left, right, left | right))
            flops = 2 * prod(self.sizes[name] for name in a | b)
            self._joins[left, right] = flops, read + read_too + written
        return self._joins[left, right]

    def _part(self, part: frozenset[int]) -> tuple[frozenset[str], int]:
        """The dims of a product of leaves, and the bytes it takes."""
        if part not in self._parts:
            dims = dims_of(self.chain, part)
            names = frozenset(dim.name for dim in dims)
            on_chip = is_square(dims) and len(part) in (1, len(self.chain.leaves))
            elements = 0 if on_chip else prod(self.sizes[name] for name in names)
            self._parts[part] = names, elements * WIDTH[self._dtype(part)]
        return self._parts[part]

    def _dtype(self, part: frozenset[int]) -> DType:
        if len(part) == 1:
            return self.chain.leaves[min(part)].type.dtype
        whole = len(part) == len(self.chain.leaves)
        return self.chain.result.dtype if whole else self.chain.middle
