"""What each op is on one rank: a rule per op, from its operands' placements to its result's.

| op | divided dims | partial operands |
| --- | --- | --- |
| sources | a parameter's are the rules' | - |
| map | the operands', aligned: a whole dim is cut to the part that another has | kept by sums of alike ones, by products with one, by casts |
| contract | those not summed; a summed one makes a partial sum | kept by products with one |
| reduce | a reduced one is reduced between the ranks | of sums |
| softmax, choices, ``select`` | not those that they run over: gathered first | no |
| views, ``cache`` | the operand's, part by part | kept by views |
| ``gather`` | of a table divided along what is looked up: a partial result, 0 elsewhere | no |
| bodies (``call``, ``chain``, ``branch``, composites) | as the body makes of the arguments' | given back by a body that ends in one |
| ``apply``, ``experts`` | of an array dealt out: route, dispatch, the blocks' own, combine | over ranks that keep all tokens |
| ``scan`` | none: gathered first | no |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from compiler.collectives import divided, whole
from compiler.ir import Dim, Node, Type
from compiler.passes.placing import (
    Operands,
    Placed,
    Placer,
    attributes,
    axes_of,
    is_divided,
    like,
    renamed,
)

Rule = Callable[[Placer, Node], Placed]


def place(placer: Placer, node: Node) -> Placed:
    """The node on one rank.

    Raises:
        NotBuilt: there is no rule for it here.
    """
    from compiler.passes import placing_bodies as bodies

    if node.op in RULES:
        return RULES[node.op](placer, node)
    if node.op in bodies.RULES:
        return bodies.RULES[node.op](placer, node)
    raise placer.fails(node, f"there is no placement for the op '{node.op}'")


def result(type: Type, dims: Mapping[str, Dim]) -> Type:
    """A result's type with its dims as they are now."""
    return replace(type, dims=tuple(_now(d, dims) for d in type.dims))


def _now(dim: Dim, dims: Mapping[str, Dim]) -> Dim:
    if dim.name in dims:
        return dims[dim.name]
    if not dim.parts:
        return dim
    parts = [_now(p, dims) for p in dim.parts]
    return Dim.sum(parts) if dim.form == "sum" else Dim.product(parts)


def once(placer: Placer, node: Node, given: Operands) -> Operands:
    """Operands in which no mesh axis divides two dims of the node, and none of those along which an
    operand is a partial sum."""
    used: dict[str, str] = {}
    for value in given.values:
        used |= dict.fromkeys(value.partial, "")
    for old, dim in list(given.dims.items()):
        for axis in dim.axes:
            if used.setdefault(axis, old) == old:
                continue
            if not used[axis]:  # the partial sum is put together first
                return once(placer, node, placer.all_summed(given))
            return once(placer, node, placer.made_whole(node, given, [old]))
    return given


def source(placer: Placer, node: Node) -> Placed:
    return placer.emit(node, (), node.type)


def parameter(placer: Placer, node: Node) -> Placed:
    module = placer.sharder.modules[placer.module]
    found = next(p for p in module.parameters if p.name == node.attrs["param"])
    return placer.emit(node, (), found.type)


def elementwise(placer: Placer, node: Node) -> Placed:
    given = once(placer, node, placer.unified(node))
    fn = node.attrs["fn"]
    partial: tuple[str, ...] = ()
    sums = [v.partial for v in given.values]
    if any(sums):
        alike = len(set(sums)) == 1
        linear = fn in ("mul", "div") and sums.count(()) == len(sums) - 1
        if fn == "div" and sums[0] == ():
            linear = False
        if (fn in ("add", "sub", "neg") and alike) or linear:
            partial = next(s for s in sums if s)
        else:
            given = placer.all_summed(given)
    made = placer.emit(node, given.names, result(node.type, given.dims))
    return replace(made, partial=partial)


def contract(placer: Placer, node: Node) -> Placed:
    given = once(placer, node, placer.unified(node))
    if sum(bool(v.partial) for v in given.values) > 1:
        given = placer.all_summed(given)
    partial = next((v.partial for v in given.values if v.partial), ())
    over = [given.dims.get(name) for name in node.attrs["over"]]
    partial += axes_of(d for d in over if d is not None)
    attrs = attributes(node, given.dims)
    made = placer.emit(node, given.names, result(node.type, given.dims), attrs=attrs)
    return replace(made, partial=partial)


def reduce(placer: Placer, node: Node) -> Placed:
    given = placer.unified(node)
    fn = node.attrs["fn"]
    (value,) = given.values
    over = axes_of(given.dims[name] for name in node.attrs["over"])
    if value.partial and (fn != "sum" or set(over) & set(value.partial)):
        given = placer.all_summed(given)
    partial = given.values[0].partial
    attrs = attributes(node, given.dims)
    made = placer.emit(node, given.names, result(node.type, given.dims), attrs=attrs)
    if fn == "sum":
        return replace(made, partial=partial + over)
    if over:
        return placer.beside(made, "all_reduce", made.type, axes=over, fn=fn)
    return made


def along_one(placer: Placer, node: Node) -> Placed:
    """Softmax and choices: what they run over is gathered."""
    given = placer.all_summed(placer.unified(node))
    given = placer.made_whole(node, given, [node.attrs["over"]])
    attrs = attributes(node, given.dims)
    return placer.emit(node, given.names, result(node.type, given.dims), attrs=attrs)


def alike(placer: Placer, node: Node) -> Placed:
    """Views and joins that keep dims, or name new ones."""
    given = placer.unified(node)
    sums = {v.partial for v in given.values}
    if len(sums) > 1:
        given = placer.all_summed(given)
        sums = {()}
    attrs = attributes(node, given.dims)
    made = placer.emit(node, given.names, result(node.type, given.dims), attrs=attrs)
    return replace(made, partial=sums.pop())


def kept(placer: Placer, node: Node) -> Placed:
    """What is kept is put together before."""
    given = placer.all_summed(placer.unified(node))
    attrs = attributes(node, given.dims)
    return placer.emit(node, given.names, result(node.type, given.dims), attrs=attrs)


def gather(placer: Placer, node: Node) -> Placed:
    given = once(placer, node, placer.all_summed(placer.unified(node)))
    name = node.attrs["dim"]
    at = placer.old[node.inputs[0]].type.names.index(name)
    dim = given.values[0].type.dims[at]
    if is_divided(dim) and not dim.axes:  # picks are of all of it, and it is divided in its parts
        given = placer.made_whole(node, given, [name])
    if dim.axes:
        attrs = {"axes": dim.axes, "dim": dim.name}
        type = result(node.type, given.dims)
        made = placer.emit(node, given.names, type, op="gather_part", attrs=attrs)
        return replace(made, partial=dim.axes)
    return placer.emit(
        node, given.names, result(node.type, given.dims), attrs=attributes(node, given.dims)
    )


def flatten(placer: Placer, node: Node) -> Placed:
    """Joined in row-major order: only the outermost can be divided, unless the dim made remembers
    its parts."""
    given = placer.unified(node)
    names, into = node.attrs["dims"], node.attrs["into"]
    if into.form == "product":
        into = Dim.product([given.dims[n] for n in names])
    else:
        inner = [n for n in names[1:] if is_divided(given.dims[n])]
        if given.dims[names[0]].parts:
            inner.append(names[0])
        given = placer.made_whole(node, given, inner)
        into = divided(into, given.dims[names[0]].axes)
    attrs = {"dims": tuple(given.dims[n].name for n in names), "into": into}
    type = result(node.type, {**given.dims, node.attrs["into"].name: into})
    made = placer.emit(node, given.names, type, attrs=attrs)
    return replace(made, partial=given.values[0].partial)


def unflatten(placer: Placer, node: Node) -> Placed:
    given = placer.unified(node)
    name, into = node.attrs["dim"], node.attrs["into"]
    dim = given.dims[name]
    if dim.axes:
        sizes = {**placer.sharder.program.sizes, **_ranks(placer)}
        first = divided(into[0], dim.axes)
        if into[0].size.at(sizes) % (into[0].size / first.size).at(sizes):
            given = placer.made_whole(node, given, [name])
            dim = given.dims[name]
        else:
            into = (first, *into[1:])
    elif dim.parts:
        into = tuple(like(i, p) for i, p in zip(into, dim.parts, strict=True))
    known = {old.name: new for old, new in zip(node.attrs["into"], into, strict=True)}
    type = result(node.type, {**given.dims, **known})
    made = placer.emit(node, given.names, type, attrs={"dim": dim.name, "into": into})
    return replace(made, partial=given.values[0].partial)


def _ranks(placer: Placer) -> dict[str, int]:
    return {f"ranks.{axis}": size for axis, size in placer.sharder.mesh.items()}


def part(placer: Placer, node: Node) -> Placed:
    given = placer.unified(node)
    name, chosen = node.attrs["dim"], node.attrs["part"]
    dim = given.dims[name]
    own = next(
        new
        for old, new in zip(_old_dim(placer, node, name).parts, dim.parts, strict=True)
        if old.name == chosen
    )
    type = result(node.type, {**given.dims, chosen: own})
    made = placer.emit(node, given.names, type, attrs={"dim": dim.name, "part": own.name})
    return replace(made, partial=given.values[0].partial)


def _old_dim(placer: Placer, node: Node, name: str) -> Dim:
    return placer.old[node.inputs[0]].type.dim(name)


def select(placer: Placer, node: Node) -> Placed:
    given = placer.made_whole(node, placer.unified(node), [node.attrs["dim"]])
    attrs = attributes(node, given.dims)
    made = placer.emit(node, given.names, result(node.type, given.dims), attrs=attrs)
    return replace(made, partial=given.values[0].partial)


def rename(placer: Placer, node: Node) -> Placed:
    given = placer.unified(node)
    dim, into = given.dims[node.attrs["dim"]], node.attrs["to"]
    one_is_a_sum = "sum" in (dim.form, into.form) and len(dim.parts) != len(into.parts)
    if one_is_a_sum and axes_of([dim]):  # a rank's rows are other ones of a sum than of an index
        given = placer.made_whole(node, given, [node.attrs["dim"]])
        dim = given.dims[node.attrs["dim"]]
    to = like(node.attrs["to"], dim)
    type = result(node.type, {**given.dims, node.attrs["to"].name: to})
    made = placer.emit(node, given.names, type, attrs={"dim": dim.name, "to": to})
    return replace(made, partial=given.values[0].partial)


def concat(placer: Placer, node: Node) -> Placed:
    given = placer.all_summed(placer.unified(node))
    old: Dim = node.attrs["dim"]
    into = Dim.sum([_now(p, given.dims) for p in old.parts])
    type = result(node.type, {**given.dims, old.name: into})
    return placer.emit(node, given.names, type, attrs={"dim": into})


RULES: dict[str, Rule] = {
    **dict.fromkeys(("position", "constant", "iota"), source),
    **dict.fromkeys(("param", "state"), parameter),
    "map": elementwise,
    **dict.fromkeys(("contract", "scaled_contract"), contract),
    "reduce": reduce,
    **dict.fromkeys(("softmax", "top", "argtop", "in_top"), along_one),
    **dict.fromkeys(("cast", "expand", "select_rows", "stack"), alike),
    **dict.fromkeys(("cache", "shift"), kept),
    "gather": gather,
    "flatten": flatten,
    "unflatten": unflatten,
    "part": part,
    "select": select,
    "rename": rename,
    "concat": concat,
}

__all__ = ["RULES", "place", "renamed", "result", "whole"]
