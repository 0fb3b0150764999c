"""fp8: codes where `select-fp8` chose, made once and close to where the value is made.

Each chosen contraction gets its parameter as it is stored, and the other factor from a `quantize`:
one for all contractions that read the value in one format. The product is written on the stored
matrix, whole; what the source calls its rows and columns are views of the result and of the factor.
Only where the source reads some of a matrix is the product one of what the codes stand for.

Then quantising moves up: out of a body whose argument is read quantised and not otherwise, so that
codes are what is handed over (and dispatched to experts), and into a body whose result is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from compiler import spec
from compiler.coding import Coding
from compiler.ir import KEPT, Dim, Graph, Module, Node, Program, Rewriter, Type
from compiler.passes import dispatch_codes
from compiler.passes.select_fp8 import Weight, weight_of

HANDED = frozenset({"call", "apply", "experts"})  # what hands values to bodies one by one


def run(program: Program) -> Program:
    homes: dict[str, list[Module]] = {}
    for scope, graph in spec.scopes(program):
        homes.setdefault(graph.name, []).append(program.modules[scope.module])
    bodies = {
        name: _Body(graph, homes.get(name, [])).run() for name, graph in program.bodies.items()
    }
    program = program.with_bodies(bodies)
    while (moved := _arguments(program) or _sent(program) or _results(program)) is not None:
        program = moved
    return dispatch_codes.run(program)


# -- within a body ---------------------------------------------------------------------------------


class _Body:
    """Rewrites one body: parameters as they are stored, and their contractions on codes."""

    def __init__(self, graph: Graph, homes: list[Module]):
        self.graph = graph
        self.homes = homes
        self.made = Rewriter(graph)
        self.codes: dict[str, str] = {}  # of parameters: by name, nodes of the new graph
        self.quantised: dict[tuple[str, Coding], str] = {}

    def run(self) -> Graph:
        for node in self.graph:
            if node.op == "param" and (coding := self._coding(node.attrs["param"])):
                self._parameter(node, coding)
            elif node.op == "scaled_contract" and node.attrs.get("quantises"):
                self.made.replace(node.name, self._product(node))
            else:
                self.made.replace(node.name, self.made.copy(node).name)
        return self.made.done()

    def _coding(self, parameter: str) -> Coding | None:
        """How a parameter is kept, wherever the body runs; None if not everywhere alike."""
        found = {p.coding for m in self.homes for p in m.parameters if p.name == parameter}
        return found.pop() if len(found) == 1 else None

    def _parameter(self, node: Node, coding: Coding) -> None:
        columns = node.type.names[1:] or node.type.names
        type = replace(node.type, dtype="coded", coding=coding.along(*columns))
        stored = self.made.copy(node, type=type).name
        self.codes[node.attrs["param"]] = stored
        wide = self.made.emit(f"{stored}_wide", "dequantize", [stored], node.type, span=node.span)
        self.made.replace(node.name, wide.name)

    def _product(self, node: Node) -> str:
        parameters = tuple(p for m in self.homes[:1] for p in m.parameters)
        weight = weight_of(parameters, self.graph, node)
        if weight is not None and weight.parameter in self.codes:
            stored = self.made.new[self.codes[weight.parameter]].type
            if weight.whole and len(node.inputs) == 2 and _lies(node, weight, stored):
                return self._on_codes(node, weight, stored)
        return self._by_name(node, weight)

    def _on_codes(self, node: Node, weight: Weight, stored: Type) -> str:
        """The product with a whole stored matrix."""
        assert weight.rows is not None and weight.columns is not None and stored.coding is not None
        coding = node.attrs["quantises"][1 - weight.operand]
        value = self._narrow(self.made.to[node.inputs[1 - weight.operand]])
        columns = tuple(d for d in stored.dims if d.name in stored.coding.over)
        value = self._viewed(value, weight.columns, columns)
        codes = self._quantised(value, coding.along(*(d.name for d in columns)), node)
        over = tuple(d.name for d in columns)
        attrs = {**{k: v for k, v in node.attrs.items() if k != "quantises"}, "over": over}
        rows = tuple(d for d in stored.dims if d not in columns)
        operands = [codes, self.codes[weight.parameter]]
        if rows == weight.rows:
            final = node.with_(
                name=self.made.new.fresh(node.name), inputs=tuple(operands), attrs=attrs
            )
            return self.made.new.add(final).name
        dims: list[Dim] = []
        for dim in node.type.dims:
            dims += [dim] if dim not in weight.rows else rows if rows[0] not in dims else []
        type = Type(node.type.dtype, tuple(dims))
        whole = self.made.emit(
            f"{node.name}_flat", "scaled_contract", operands, type, attrs=attrs, span=node.span
        )
        view = _view(rows, weight.rows)
        final = node.with_(
            name=self.made.new.fresh(node.name), op=view[0], inputs=(whole.name,), attrs=view[1]
        )
        return self.made.new.add(final).name

    def _by_name(self, node: Node, weight: Weight | None) -> str:
        """Any other product: coded factors, and a part of a matrix as its codes stand for it."""
        operands = []
        for at, (name, coding) in enumerate(zip(node.inputs, node.attrs["quantises"], strict=True)):
            if coding is not None:
                operands.append(self._quantised(self._narrow(self.made.to[name]), coding, node))
            elif weight is not None and at == weight.operand and weight.parameter in self.codes:
                operands.append(self._exact(name, weight.parameter))
            else:
                operands.append(self.made.to[name])
        attrs = {k: v for k, v in node.attrs.items() if k != "quantises"}
        final = node.with_(name=self.made.new.fresh(node.name), inputs=tuple(operands), attrs=attrs)
        return self.made.new.add(final).name

    def _exact(self, name: str, parameter: str) -> str:
        """A view of a parameter in f32, in which code x scale is not rounded again."""
        node = self.graph[name]
        if node.op == "param":
            stored = self.codes[parameter]
            type = Type("f32", node.type.dims)
            return self.made.emit(
                f"{stored}_exact", "dequantize", [stored], type, span=node.span
            ).name
        before = self._exact(node.inputs[0], parameter)
        if node.op == "cast":
            return before
        type = Type("f32", node.type.dims)
        return self.made.emit(
            f"{node.name}_exact", node.op, [before], type, attrs=node.attrs, span=node.span
        ).name

    def _quantised(self, value: str, coding: Coding, reader: Node) -> str:
        key = (value, coding)
        if key not in self.quantised:
            node = self.made.new[value]
            self.quantised[key] = quantize(self.made, node, coding, reader).name
        return self.quantised[key]

    def _narrow(self, value: str) -> str:
        """The value before it was widened: it is quantised to the same codes."""
        node = self.made.new[value]
        if node.op == "cast" and not node.rounds and node.type.dtype == "f32":
            before = self.made.new[node.inputs[0]]
            return before.name if before.type.dtype == "act" else value
        return value

    def _viewed(self, value: str, dims: tuple[Dim, ...], into: tuple[Dim, ...]) -> str:
        """A value with these dims under the names that the stored matrix has for them."""
        if dims == into:
            return value
        node = self.made.new[value]
        left = tuple(d for d in node.type.dims if d not in dims)
        op, attrs = _view(dims, into)
        type = Type(node.type.dtype, (*left, *into))
        stem = f"{node.label or node.name}_flat"
        return self.made.emit(stem, op, [value], type, attrs=attrs, span=node.span).name


def _lies(node: Node, weight: Weight, stored: Type) -> bool:
    """Whether the sum runs over the stored matrix's columns, and their tiles are the factor's."""
    coding = node.attrs["quantises"][1 - weight.operand]
    assert weight.columns is not None and weight.rows is not None and stored.coding is not None
    names = tuple(d.name for d in weight.columns)
    columns = [d for d in stored.dims if d.name in stored.coding.over]
    rows = [d for d in stored.dims if d not in columns]
    return (
        coding is not None
        and set(names) == set(node.attrs["over"])
        and coding.over == names
        and (list(weight.columns) == columns or len(columns) == 1)
        and (list(weight.rows) == rows or len(rows) == 1)
    )


def _view(dims: tuple[Dim, ...], into: tuple[Dim, ...]) -> tuple[str, dict[str, object]]:
    """The op and attributes that make one of the two, of which one is a single dim, the other."""
    if len(dims) == len(into) == 1:
        return "rename", {"dim": dims[0].name, "to": into[0]}
    if len(into) == 1:
        return "flatten", {"dims": tuple(d.name for d in dims), "into": into[0]}
    return "unflatten", {"dim": dims[0].name, "into": into}


def quantize(made: Rewriter, value: Node, coding: Coding, reader: Node) -> Node:
    type = Type("coded", value.type.dims, coding=coding)
    stem = f"{value.label or value.name.removesuffix('_flat')}_codes"
    return made.emit(
        stem, "quantize", [value.name], type, attrs={"coding": coding}, span=reader.span
    )


# -- between bodies --------------------------------------------------------------------------------


def _arguments(program: Program) -> Program | None:
    """One argument that is only read quantised, quantised by all who hand it over; None if there
    is none."""
    entries = {entry.body for entry in program.entries.values()}
    for graph in program.bodies.values():
        for place, node in enumerate(graph.inputs):
            coding = _read_as(graph, node)
            callers = list(_callers(program, graph.name)) if coding else []
            if graph.name in entries or not callers or coding is None:
                continue
            if any(caller.op not in HANDED for _, caller in callers):
                continue
            bodies = dict(program.bodies)
            bodies[graph.name] = _taking_codes(graph, node, coding)
            for name, caller in callers:
                at = place + (caller.op == "apply")  # behind the pick
                names = dict(caller.attrs.get("dims", ()))
                outside = coding.along(*(names.get(n, n) for n in coding.over))
                bodies[name] = _handing_codes(bodies[name], caller.name, at, outside)
            return program.with_bodies(bodies)
    return None


def _read_as(graph: Graph, node: Node) -> Coding | None:
    """The coding in which alone a value is read."""
    users = graph.users(node.name)
    codings = {u.attrs["coding"] if u.op == "quantize" else None for u in users}
    if len(codings) != 1 or node.name == graph.output:
        return None
    return codings.pop()


def _callers(program: Program, body: str) -> Iterator[tuple[str, Node]]:
    for name, graph in program.bodies.items():
        for node in graph:
            if any(run.body == body for run in spec.runs(node, graph)):
                yield name, node


def _taking_codes(graph: Graph, given: Node, coding: Coding) -> Graph:
    made = Rewriter(graph)
    for node in graph:
        if node.op == "quantize" and node.inputs == (given.name,):
            made.replace(node.name, made.to[given.name])
            continue
        changes = {}
        if node.name == given.name:
            changes = {"type": Type("coded", node.type.dims, coding=coding)}
        made.replace(node.name, made.copy(node, **changes).name)
    return made.done()


def _handing_codes(graph: Graph, caller: str, at: int, coding: Coding) -> Graph:
    """The body with one operand of one node quantised, by a node that is there if possible."""
    made = Rewriter(graph)
    for node in graph:
        if node.name == caller:
            value = made.new[made.to[node.inputs[at]]]
            known = [
                user
                for user in made.new.users(value.name)
                if user.op == "quantize" and user.attrs["coding"] == coding
            ]
            codes = known[0] if known else quantize(made, value, coding, node)
            inputs = [made.to[i] for i in node.inputs]
            inputs[at] = codes.name
            made.replace(node.name, made.new.add(node.with_(inputs=tuple(inputs))).name)
            continue
        made.replace(node.name, made.copy(node).name)
    return _once(made.done())


def _once(graph: Graph) -> Graph:
    """The same with each value quantised once in each coding."""
    made = Rewriter(graph)
    known: dict[tuple[str, Coding], str] = {}
    for node in graph:
        if node.op == "quantize":
            key = (made.to[node.inputs[0]], node.attrs["coding"])
            if key not in known:
                known[key] = made.copy(node).name
            made.replace(node.name, known[key])
            continue
        made.replace(node.name, made.copy(node).name)
    return made.done()


def _sent(program: Program) -> Program | None:
    """One value that ranks send each other and only read quantised, sent quantised; None if there
    is none."""
    for graph in program.bodies.values():
        for node in graph:
            coding = _read_as(graph, node) if node.op == "dispatch" else None
            if coding is None or not set(coding.over) <= set(graph[node.inputs[2]].type.names):
                continue
            made = Rewriter(graph)
            for old in graph:
                if old.op == "quantize" and old.inputs == (node.name,):
                    made.replace(old.name, made.to[node.name])
                elif old.name == node.name:
                    value = made.new[made.to[node.inputs[2]]]
                    codes = quantize(made, value, coding, node)
                    inputs = (*(made.to[i] for i in node.inputs[:2]), codes.name)
                    type = replace(node.type, dtype="coded", coding=coding)
                    made.replace(old.name, made.new.add(node.with_(inputs=inputs, type=type)).name)
                else:
                    made.replace(old.name, made.copy(old).name)
            return program.with_bodies({**program.bodies, graph.name: _once(made.done())})
    return None


def _results(program: Program) -> Program | None:
    """One call whose result is only read quantised, of a body that quantises it; None if none."""
    for graph in program.bodies.values():
        for node in graph:
            coding = _read_as(graph, node) if node.op == "call" else None
            if coding is None:
                continue
            body = program.bodies[node.attrs["body"]]
            if not _may_quantise(body):
                continue
            names = {outer: own for own, outer in node.attrs["dims"]}
            inside = coding.along(*(names.get(n, n) for n in coding.over))
            return _giving_codes(program, graph, node, body, inside, coding)
    return None


def _may_quantise(body: Graph) -> bool:
    """Whether there may be a second form of a body: it keeps nothing, and runs no others that are
    not its own."""
    return not any(
        n.op in KEPT or n.op in ("call", "chain", "apply", "branch", "experts") for n in body
    )


def _giving_codes(
    program: Program, graph: Graph, call: Node, body: Graph, inside: Coding, outside: Coding
) -> Program:
    scopes = [s for s, g in spec.scopes(program) if g.name == graph.name]
    owners = {s.inside(call.attrs["child"]).module for s in scopes}
    bodies, modules = dict(program.bodies), dict(program.modules)
    name = f"{body.name}.coded"
    number = 1
    while name in bodies and _output_coding(bodies[name]) != inside:
        name, number = f"{body.name}.coded.{number}", number + 1
    if name not in bodies:
        made = Rewriter(body, name)
        for node in body:
            made.replace(node.name, made.copy(node).name)
        result = made.new[made.to[body.output]]
        bodies[name] = made.done(quantize(made, result, inside, result).name)
    for owner in owners:
        methods = dict(modules[owner].methods)
        if name not in methods.values():
            label = name.removeprefix(body.name).lstrip(".")
            methods[label] = name
            modules[owner] = replace(modules[owner], methods=methods)
    made = Rewriter(graph)
    for node in graph:
        if node.op == "quantize" and node.inputs == (call.name,):
            made.replace(node.name, made.to[call.name])
            continue
        changes = {}
        if node.name == call.name:
            type = Type("coded", node.type.dims, coding=outside)
            changes = {"attrs": {**node.attrs, "body": name}, "type": type}
        made.replace(node.name, made.copy(node, **changes).name)
    bodies[graph.name] = made.done()
    return replace(program, modules=modules).with_bodies(bodies)


def _output_coding(graph: Graph) -> Coding | None:
    return graph.result.type.coding
