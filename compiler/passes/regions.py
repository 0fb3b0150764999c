"""Where two orders of contractions differ, and how the chosen ones are built.

A region is what stands behind one branch: chains of which one reads the other's scores, through
pointwise ops and softmax; everything between them; and whatever pairs time with history beside them
(another term of the scores, a mask), so that no such square ever crosses the branch. It has one
result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx as nx

from compiler.cost import is_square
from compiler.ir import DType, Graph, Node, Rewriter, Type
from compiler.passes import chains
from compiler.passes.chains import FREE_VIEWS, Chain, Step, Tree

POINTWISE = FREE_VIEWS | {"map", "softmax", "reduce", "cast", "expand"}
SOURCES = frozenset({"param", "state", "constant", "position", "iota"})  # at hand in any body


@dataclass(frozen=True)
class Region:
    """``core`` moves into the branch's bodies; ``copied`` are sources, free views of weights,
    widening casts and masks, which cost nothing to have twice. ``inputs`` are read from outside."""

    chains: tuple[Chain, ...]
    core: frozenset[str]
    copied: frozenset[str]
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Branch:
    """A region with its two choices: ``few`` for up to ``limit`` positions at once."""

    region: Region
    few: Mapping[str, Tree]
    many: Mapping[str, Tree]
    limit: int


# -- finding -------------------------------------------------------------------------------------


def find(graph: Graph, found: list[Chain], every: list[Chain]) -> list[Region]:
    """The regions of the chains ``found``, of ``every`` chain of the body. Where a joint region
    would have several results (a value within it is read elsewhere too), each of its chains stands
    alone."""
    groups: nx.Graph[int] = nx.Graph()
    groups.add_nodes_from(range(len(found)))
    for i, chain in enumerate(found):
        ahead = _ahead(graph, chain.root)
        groups.add_edges_from((i, j) for j, other in enumerate(found) if _own(other) & ahead)
    regions: list[Region] = []
    for group in nx.connected_components(groups):
        together = [found[i] for i in sorted(group)]
        joint = _region(graph, together, every)
        alone = [_region(graph, [chain], every) for chain in together]
        regions += [joint] if joint else [region for region in alone if region]
    return regions


def _own(chain: Chain) -> set[str]:
    return {chain.root, chain.contraction, *chain.inlined}


def _ahead(graph: Graph, root: str) -> set[str]:
    """What reads these scores, directly or through pointwise ops on values over time x history."""
    seen: set[str] = set()
    todo = [root] if is_square(graph[root].type.dims) else []
    while todo:
        for user in graph.nx.successors(todo.pop()):
            if user not in seen:
                seen.add(user)
                if graph[user].op in POINTWISE and is_square(graph[user].type.dims):
                    todo.append(user)
    return seen


def _region(graph: Graph, group: list[Chain], every: list[Chain]) -> Region | None:
    weight, masks = chains.weights(graph), _masks(graph)
    core: set[str] = set().union(*(_own(chain) for chain in group))
    copied: set[str] = set()
    size = 0
    while size != len(core) + len(copied):
        size = len(core) + len(copied)
        below = set().union(*(nx.descendants(graph.nx, name) for name in core))
        above = set().union(*(nx.ancestors(graph.nx, name) for name in core))
        core |= below & above
        for chain in every:  # one that lies between is multiplied in here, with all its factors
            if chain.root in core:
                core |= _own(chain)
        for operand in _read(graph, core | copied) - core - copied:
            node = graph[operand]
            if operand in masks or _is_free(graph, node, weight):
                copied.add(operand)
            elif _is_ours(graph, node, core):
                core.add(operand)
    results = [
        name
        for name in core
        if name == graph.output or not core.issuperset(graph.nx.successors(name))
    ]
    # A cache appends when it runs, and a result that several values share would have to run twice.
    if len(results) != 1 or any(graph[name].op == "cache" for name in core):
        return None
    outside = _read(graph, core | copied) - core - copied
    inputs = tuple(node.name for node in graph if node.name in outside)
    return Region(tuple(group), frozenset(core), frozenset(copied), inputs, results[0])


def _read(graph: Graph, names: Iterable[str]) -> set[str]:
    return {operand for name in names for operand in graph[name].inputs}


def _is_ours(graph: Graph, node: Node, core: set[str]) -> bool:
    """A value over time x history that nothing outside reads."""
    read_here = core.issuperset(graph.nx.successors(node.name)) and node.name != graph.output
    return read_here and is_square(node.type.dims) and node.op != "input"


def _is_free(graph: Graph, node: Node, weight: set[str]) -> bool:
    if node.op in SOURCES:
        return True
    if node.op == "cast":
        return node.type.dtype == "f32" and graph[node.inputs[0]].type.dtype == "act"
    return node.op in FREE_VIEWS and node.name in weight


def _masks(graph: Graph) -> set[str]:
    """Values computed from positions and constants alone that have no dims but time and history:
    a mask and its parts, but no rotary table."""
    plain: set[str] = set()
    for node in graph:
        only_positions = all(dim.kind in ("time", "history") for dim in node.type.dims)
        if node.op in ("constant", "position") or (
            node.op == "map" and only_positions and plain.issuperset(node.inputs)
        ):
            plain.add(node.name)
    return plain


# -- building ------------------------------------------------------------------------------------


def build(
    graph: Graph, found: list[Chain], best: Mapping[str, Tree], branches: list[Branch]
) -> tuple[Graph, list[Graph]]:
    """The body with its chains in the order chosen, and the two sides of each branch."""
    rewriter = Rewriter(graph)
    behind = {name: branch for branch in branches for name in branch.region.core}
    sides: list[Graph] = []
    by_root = {chain.root: chain for chain in found}
    gone = _replaced(found, best)
    for node in graph:
        branch = behind.get(node.name)
        if branch is None:
            _emit(rewriter, node, by_root, gone, best)
        elif node.name == branch.region.output:
            number = f".{len(sides) // 2 + 1}" if len(branches) > 1 else ""
            few = _side(graph, branch.region, found, branch.few, f"{graph.name}.few{number}")
            many = _side(graph, branch.region, found, branch.many, f"{graph.name}.many{number}")
            sides += [few, many]
            made = node.with_(
                op="branch",
                inputs=tuple(rewriter.to[name] for name in branch.region.inputs),
                attrs={
                    "when": ("time", "<=", branch.limit),
                    "then": few.name,
                    "otherwise": many.name,
                },
            )
            rewriter.replace(node.name, rewriter.new.add(made).name)
    return rewriter.done(), sides


def _side(
    graph: Graph, region: Region, found: list[Chain], choice: Mapping[str, Tree], name: str
) -> Graph:
    rewriter = Rewriter(graph, name)
    for outside in region.inputs:
        old = graph[outside]
        known_as = {"name": old.label or old.name}
        given = Node(old.name, "input", (), old.type, known_as, old.span, old.label)
        rewriter.replace(outside, rewriter.new.add(given).name)
    by_root, gone = {chain.root: chain for chain in found}, _replaced(found, choice)
    for node in graph:
        if node.name in region.core or node.name in region.copied:
            _emit(rewriter, node, by_root, gone, choice)
    return rewriter.done(rewriter.to[region.output])


def _replaced(found: list[Chain], choice: Mapping[str, Tree]) -> set[str]:
    """The nodes that go because their chain is multiplied in another order than the source's."""
    gone: set[str] = set()
    for chain in found:
        if not _is_source(chain, choice[chain.contraction]):
            gone |= _own(chain)
    return gone


def _is_source(chain: Chain, tree: Tree) -> bool:
    inner = [chains.members(pair) for pair in chains.joins(tree)][:-1]
    return len(inner) == len(chain.lets) and all(part in chain.lets for part in inner)


def _emit(
    rewriter: Rewriter,
    node: Node,
    by_root: Mapping[str, Chain],
    gone: set[str],
    choice: Mapping[str, Tree],
) -> None:
    if node.name not in gone:
        rewriter.replace(node.name, rewriter.copy(node).name)
    elif node.name in by_root:
        chain = by_root[node.name]
        made = _multiply(rewriter, chain, choice[chain.contraction])
        rewriter.replace(node.name, made)


def _multiply(rewriter: Rewriter, chain: Chain, tree: Tree) -> str:
    """Emit a chain's pairwise contractions; returns the name of its result."""
    if isinstance(tree, int):
        return _leaf(rewriter, chain, tree)
    left, right = (_multiply(rewriter, chain, part) for part in tree)
    step = chains.step(chain, *tree)
    if len(step.leaves) < len(chain.leaves):
        source = chain.lets.get(step.leaves)
        if source is not None:  # what the source calls it
            like = rewriter.old[source]
        else:
            like = Node(_stem(rewriter.old, chain, step), "", (), chain.result)
            like = like.with_(span=rewriter.old[chain.contraction].span)
        return _contract(rewriter, left, right, step, chain.middle, like)
    return _contract(rewriter, left, right, step, chain.result.dtype, rewriter.old[chain.root])


def _leaf(rewriter: Rewriter, chain: Chain, number: int) -> str:
    leaf = chain.leaves[number]
    name = rewriter.to[leaf.value]
    type = rewriter.old[leaf.value].type
    for old, dim in leaf.renamed:
        dims = tuple(dim if d.name == old else d for d in type.dims)
        type = Type(type.dtype, dims, type.of)
        name = rewriter.emit(name, "rename", [name], type, attrs={"dim": old, "to": dim}).name
    return name


def _contract(
    rewriter: Rewriter, left: str, right: str, step: Step, dtype: DType, like: Node
) -> str:
    """One contraction of two values of the new graph. It accumulates in f32 whatever it gives, so
    only a factor that is f32 itself calls for widening the other."""
    narrow = dtype == "act" and all(
        rewriter.new[name].type.dtype == "act" for name in (left, right)
    )
    read = [left, right] if narrow else [_widened(rewriter, name) for name in (left, right)]
    rest = {"span": like.span, "label": like.label, "rounds": like.rounds}
    attrs = {"over": step.over}
    if narrow or dtype == "f32":
        made = Type(dtype, step.dims)
        return rewriter.emit(like.name, "contract", read, made, attrs=attrs, **rest).name
    wide = rewriter.emit(
        f"{like.name}_wide", "contract", read, Type("f32", step.dims), attrs=attrs, span=like.span
    )
    return rewriter.emit(like.name, "cast", [wide.name], Type(dtype, step.dims), **rest).name


def _widened(rewriter: Rewriter, name: str) -> str:
    node = rewriter.new[name]
    if node.type.dtype != "act":
        return name
    for user in rewriter.new.users(name):
        if user.op == "cast" and user.type.dtype == "f32":
            return user.name
    wide = Type("f32", node.type.dims)
    return rewriter.emit(f"{name}_wide", "cast", [name], wide, span=node.span).name


def _stem(graph: Graph, chain: Chain, step: Step) -> str:
    """A name to read for a product that the source has no name for: q_W_uk is q times W_uk."""

    def word(node: Node) -> str:
        if node.label or not node.inputs:
            return node.label or str(node.attrs.get("param", node.name))
        return word(graph[node.inputs[0]]) if node.op in FREE_VIEWS | {"cast"} else node.name

    return "_".join(word(graph[chain.leaves[i].value]) for i in sorted(step.leaves))
