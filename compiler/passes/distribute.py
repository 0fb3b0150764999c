"""Products brought into the form in which their order can be chosen.

Four rules of arithmetic, each applied only to values that are free of rounding:

- a part of a product is a product with a part: ``kv = W * c`` of which ``kv[n]`` and ``kv[v]`` are
  read becomes ``W[n] * c`` and ``W[v] * c``;
- a product with stacked rows, summed over the stack, is a sum of products:
  ``q[n|j] * (a[n] | b[j])`` becomes ``q[n] * a[n] + q[j] * b[j]``, and the stack is not built;
- a factor repeated along a dim that another factor has need not be repeated;
- a number is no factor to choose an order for: it multiplies the result.
"""

from __future__ import annotations

from compiler.cost import is_square
from compiler.ir import Dim, Graph, Node, Rewriter, Type
from compiler.passes import chains
from compiler.passes.chains import FREE_VIEWS

CLOTHES = FREE_VIEWS | {"cast", "concat", "expand"}


def run_on(graph: Graph) -> Graph:
    """The body with views moved into products, stacks distributed and numbers moved out.

    Every application removes an occasion of its rule and makes none of another, so this ends."""
    changed: Graph | None = graph
    while changed is not None:
        graph = changed
        changed = _views(graph) or _stacks(graph) or _broadcasts(graph) or _numbers(graph)
    return graph


# -- a part of a product is a product with a part ------------------------------------------------


def _views(graph: Graph) -> Graph | None:
    """One product that is only read through views of it, each view moved into a factor."""
    for node in graph:
        if node.op != "contract" or node.rounds or node.name == graph.output:
            continue
        users = graph.users(node.name)
        # Where no view is a factor again nothing is gained, and one product is made two.
        if all(_moves(node, user) for user in users) and any(_is_factor(graph, u) for u in users):
            return _move(graph, node, {user.name for user in users})
    return None


def _is_factor(graph: Graph, node: Node) -> bool:
    """Does a contraction read the value, as it is or in other clothes?"""
    return any(
        user.op == "contract" or (user.op in CLOTHES and _is_factor(graph, user))
        for user in graph.users(node.name)
    )


def _moves(product: Node, view: Node) -> bool:
    """May the view be taken of each factor alone? A flatten joins dims that factors share out."""
    if view.op not in ("part", "select", "rename", "unflatten") or view.rounds:
        return False
    made = set(view.type.names) - set(product.type.names)
    return not made & set(product.attrs["over"])


def _move(graph: Graph, product: Node, views: set[str]) -> Graph:
    rewriter = Rewriter(graph)
    for node in graph:
        if node.name == product.name:
            continue
        if node.name not in views:
            rewriter.replace(node.name, rewriter.copy(node).name)
            continue
        factors = []
        for factor in graph.operands(product):
            name = rewriter.to[factor.name]
            if node.attrs["dim"] in factor.type.names:
                name = _view(rewriter, node, rewriter.new[name])
            factors.append(name)
        made = node.with_(op="contract", inputs=tuple(factors), attrs=product.attrs)
        rewriter.replace(node.name, rewriter.new.add(made).name)
    return rewriter.done()


def _view(rewriter: Rewriter, view: Node, factor: Node) -> str:
    """The same view of a factor: the viewed dim's place in it is taken by what the view makes."""
    dim = view.attrs["dim"]
    made: list[Dim] = []  # select takes the dim away
    if view.op == "part":
        made = [p for p in factor.type.dim(dim).parts if p.name == view.attrs["part"]]
    elif view.op == "rename":
        made = [view.attrs["to"]]
    elif view.op == "unflatten":
        made = list(view.attrs["into"])
    dims = [d for old in factor.type.dims for d in (made if old.name == dim else [old])]
    type = Type(factor.type.dtype, tuple(dims), factor.type.of)
    return rewriter.emit(
        factor.name, view.op, [factor.name], type, attrs=view.attrs, span=view.span
    ).name


# -- a product with stacked rows is a sum of products --------------------------------------------


def _stacks(graph: Graph) -> Graph | None:
    count = chains.reads(graph)
    for node in graph:
        if node.op != "contract":
            continue
        for read in node.inputs:
            stack = graph[read]
            if stack.op == "cast" and count[read] == 1 and not stack.rounds:
                stack = graph[stack.inputs[0]]
            if stack.op != "concat" or stack.rounds or count[stack.name] != 1:
                continue
            dim: Dim = stack.attrs["dim"]
            taken = {name for factor in graph.operands(node) for name in factor.type.names}
            free = dim.name in node.attrs["over"] and not taken & {p.name for p in dim.parts}
            if free and (is_square(node.type.dims) or _is_made_of_products(graph, stack)):
                return _distribute(graph, node, stack)
    return None


def _is_made_of_products(graph: Graph, stack: Node) -> bool:
    """Has a stack parts that could be factors, or are repeated? If not, one product of the whole is
    better than several of its parts."""
    return any(
        part.op in ("contract", "expand") and not part.rounds for part in graph.operands(stack)
    )


def _distribute(graph: Graph, product: Node, stack: Node) -> Graph:
    rewriter = Rewriter(graph)
    for node in graph:
        if node.name != product.name:
            rewriter.replace(node.name, rewriter.copy(node).name)
            continue
        terms = [_term(rewriter, product, stack, i) for i in range(len(stack.inputs))]
        total = terms[0]
        for i, term in enumerate(terms[1:], 2):
            like = product if i == len(terms) else Node(f"{product.name}_sum", "", (), product.type)
            total = rewriter.emit(
                like.name,
                "map",
                [total, term],
                product.type,
                attrs={"fn": "add"},
                span=product.span,
                label=like.label,
                rounds=like.rounds,
            ).name
        rewriter.replace(node.name, total)
    return rewriter.done()


def _term(rewriter: Rewriter, product: Node, stack: Node, number: int) -> str:
    """The product with one of the stacked parts; other factors give theirs of the same rows."""
    dim: Dim = stack.attrs["dim"]
    rows = dim.parts[number]
    factors = []
    for factor in rewriter.old.operands(product):
        # Casts are taken of the part, so that what is read stays narrow.
        source = rewriter.old[factor.inputs[0]] if factor.op == "cast" else factor
        part = rewriter.new[rewriter.to[source.name]]
        if source.op == "concat" and source.attrs["dim"] == dim:
            part = rewriter.new[rewriter.to[source.inputs[number]]]
        elif dim.name in source.type.names:
            kept = tuple(rows if d.name == dim.name else d for d in source.type.dims)
            taken = {"dim": dim.name, "part": rows.name}
            stem, type = f"{source.name}_{rows.name}", Type(source.type.dtype, kept)
            part = rewriter.emit(stem, "part", [part.name], type, attrs=taken, span=source.span)
        if part.type.dtype != factor.type.dtype:
            wide = Type(factor.type.dtype, part.type.dims)
            part = rewriter.emit(f"{part.name}_wide", "cast", [part.name], wide, span=part.span)
        factors.append(part.name)
    over = tuple(
        name
        for old in product.attrs["over"]
        for name in ([rows.name] if old == dim.name else [old])
    )
    stem = f"{product.name}_{rows.name}"
    attrs = {"over": over}
    return rewriter.emit(
        stem, "contract", factors, product.type, attrs=attrs, span=product.span
    ).name


# -- repeated factors ----------------------------------------------------------------------------


def _broadcasts(graph: Graph) -> Graph | None:
    for node in graph:
        factors = graph.operands(node) if node.op == "contract" else []
        for i, factor in enumerate(factors):
            repeat = graph[factor.inputs[0]] if factor.op == "cast" else factor
            if repeat.op != "expand":
                continue
            others = {n for j, f in enumerate(factors) if j != i for n in f.type.names}
            if others.issuperset(d.name for d in repeat.attrs["dims"]):
                return _unrepeated(graph, node, i, repeat)
    return None


def _unrepeated(graph: Graph, product: Node, position: int, repeat: Node) -> Graph:
    rewriter = Rewriter(graph)
    for node in graph:
        if node.name != product.name:
            rewriter.replace(node.name, rewriter.copy(node).name)
            continue
        inputs = [rewriter.to[name] for name in node.inputs]
        read, once = graph[node.inputs[position]], graph[repeat.inputs[0]]
        inputs[position] = rewriter.to[once.name]
        if read.type.dtype != once.type.dtype:
            type, stem = Type(read.type.dtype, once.type.dims), f"{once.name}_wide"
            wide = rewriter.emit(stem, "cast", [inputs[position]], type, span=read.span)
            inputs[position] = wide.name
        made = rewriter.new.add(node.with_(inputs=tuple(inputs)))
        rewriter.replace(node.name, made.name)
    return rewriter.done()


# -- numbers -------------------------------------------------------------------------------------


def _numbers(graph: Graph) -> Graph | None:
    for node in graph:
        if node.op != "contract" or len(node.inputs) < 3:
            continue
        numbers = [i for i in node.inputs if graph[i].op == "constant"]
        factors = [i for i in node.inputs if graph[i].op != "constant"]
        # A product that rounds to act would round once more before the number is taken.
        if numbers and len(factors) > 1 and (node.type.dtype == "f32" or not node.rounds):
            return _out(graph, node, factors, numbers)
    return None


def _out(graph: Graph, product: Node, factors: list[str], numbers: list[str]) -> Graph:
    rewriter = Rewriter(graph)
    for node in graph:
        if node.name != product.name:
            rewriter.replace(node.name, rewriter.copy(node).name)
            continue
        value = rewriter.emit(
            f"{node.name}_product",
            "contract",
            [rewriter.to[i] for i in factors],
            node.type,
            attrs=node.attrs,
            span=node.span,
        )
        for i, number in enumerate(numbers, 1):
            last = i == len(numbers)
            value = rewriter.emit(
                node.name if last else f"{node.name}_scaled",
                "map",
                [value.name, rewriter.to[number]],
                node.type,
                attrs={"fn": "mul"},
                span=node.span,
                label=node.label if last else None,
                rounds=node.rounds and last,
            )
        rewriter.replace(node.name, value.name)
    return rewriter.done()
