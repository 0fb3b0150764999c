"""The verifier: is this a well-formed program, by the spec table's word?

Run after every pass. It checks form, not meaning: SSA, known ops, attributes, types that equal what
each op's rule asks for, dims that mean one thing in a body, parameters and bodies that exist. That
a pass kept the *meaning* is ``compiler/equivalence.py``'s to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from compiler import spec, turns
from compiler.ir import DYNAMIC, KEPT, Dim, DType, Graph, Module, Node, Program, Type
from compiler.rules import RuleError, Scope, agrees, describe
from compiler.text import node_text, show
from dsl.diagnostics import Span
from dsl.extents import Extent, ExtentError

# Attributes that name a body if they are text (a composite's mask may also be numbers).
NAMES_OF_BODIES = frozenset({"body", "read", "then", "otherwise", "block", "mask", "score"})


@dataclass(frozen=True)
class Problem:
    """One broken rule: where, and what was expected and found."""

    place: str  # the body or module
    message: str
    node: Node | None = None
    span: Span | None = None

    def __str__(self) -> str:
        span = self.node.span if self.node and self.node.span else self.span
        at = f"{span}: " if span else ""
        node = f"\n    {node_text(self.node)}" if self.node else ""
        return f"{at}{self.place}: {self.message}{node}"


class VerifyError(Exception):
    """The program is not well-formed; ``problems`` says why."""

    def __init__(self, problems: list[Problem], after: str = ""):
        self.problems = problems
        head = f"the program is not well-formed{f' after {after}' if after else ''}:\n"
        super().__init__(head + "\n".join(str(p) for p in problems[:20]))


def verify(program: Program, after: str = "") -> None:
    """Check a program; ``after`` names the pass that made it, for the message.

    Raises:
        VerifyError: with every broken rule.
    """
    found = problems(program)
    if found:
        raise VerifyError(found, after)


def problems(program: Program) -> list[Problem]:
    """Every broken rule, modules first."""
    found = [*_program(program)]
    for module in program.modules.values():
        found += _module(program, module)
    for graph in program.bodies.values():
        found += _form(program, graph)
    # Types are judged where bodies run, and only if what they refer to is there.
    if not found:
        found += _types(program)
    return found


def _program(program: Program) -> Iterator[Problem]:
    if program.root not in program.modules:
        yield Problem(program.name, f"there is no module '{program.root}'")
    for key, module in program.modules.items():
        if key != module.name:
            yield Problem(key, f"the module calls itself '{module.name}'")
    for key, graph in program.bodies.items():
        if key != graph.name:
            yield Problem(key, f"the body calls itself '{graph.name}'")
    for entry in program.entries.values():
        if entry.body not in program.bodies:
            yield Problem(f"entry {entry.name}", f"there is no body '{entry.body}'")
            continue
        wanted = [n.attrs.get("name") for n in program.bodies[entry.body].inputs]
        given = [i.name for i in entry.inputs]
        if wanted != given:
            yield Problem(
                f"entry {entry.name}", f"expected inputs {wanted} of {entry.body}, found {given}"
            )
        for item in entry.inputs:
            if item.shift_of is not None and item.shift_of not in given:
                yield Problem(f"entry {entry.name}", f"there is no input '{item.shift_of}'")
    yield from _recursion(program)


def _recursion(program: Program) -> Iterator[Problem]:
    """A body must not run itself: a program ends."""
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> Iterator[Problem]:
        if name in path:
            cycle = " -> ".join((*path[path.index(name) :], name))
            yield Problem(name, f"the body runs itself: {cycle}")
        elif name in program.bodies and name not in done:
            for node in program.bodies[name]:
                for run in _runs(node, program.bodies[name]):
                    yield from walk(run.body, (*path, name))
            done.add(name)

    for name in program.bodies:
        yield from walk(name, ())


def _runs(node: Node, graph: Graph) -> list[spec.Run]:
    """The bodies that a node runs; none where it is not well-formed, which is told elsewhere."""
    try:
        return spec.runs(node, graph)
    except (KeyError, IndexError):
        return []


def _module(program: Program, module: Module) -> Iterator[Problem]:
    def problem(message: str, span: Span | None = module.span) -> Problem:
        return Problem(f"module {module.name}", message, span=span)

    for parameter in module.parameters:
        for message in _type(program, parameter.type):
            yield problem(f"parameter '{parameter.name}': {message}", parameter.span)
    own = [p.name for p in module.parameters] + sorted({c.name for c in module.children})
    for name, count in Counter(own).items():
        if count > 1:
            yield problem(f"'{name}' names {count} things")
    for name in module.names:
        if name not in own:
            yield problem(f"a checkpoint name is given for '{name}', which is not there")
    for body in module.methods.values():
        if body not in program.bodies:
            yield problem(f"there is no body '{body}'")
    ends: dict[str, Extent] = {}
    for child in module.children:
        if child.module not in program.modules:
            yield problem(f"child '{child.name}': there is no module '{child.module}'")
        if child.array is not None:
            expected = ends.get(child.name, child.array.start)
            if expected != child.array.start:
                yield problem(
                    f"array '{child.name}': expected a piece from {expected}, found one from "
                    f"{child.array.start}"
                )
            ends[child.name] = child.array.start + child.array.size
        elif child.name in ends or [c.name for c in module.children].count(child.name) > 1:
            yield problem(f"child '{child.name}' is both one and several")


def _form(program: Program, graph: Graph) -> Iterator[Problem]:
    """What can be said of a body without knowing where it runs."""
    if graph.output not in graph:
        yield Problem(graph.name, f"the output %{graph.output} is not defined")
    seen: set[str] = set()
    dims: dict[str, Dim] = {}
    for node in graph:
        for message in _node(program, graph, node, seen):
            yield Problem(graph.name, message, node)
        seen.add(node.name)
        for dim in spec.dims_of(node):
            if dims.setdefault(dim.name, dim) != dim:
                message = f"dim {dim.name} is {describe(dims[dim.name])} and {describe(dim)}"
                yield Problem(graph.name, message, node)
    yield from _twice(graph, "label", [(n.label, n) for n in graph if n.label])
    yield from _twice(graph, "argument", [(n.attrs.get("name", ""), n) for n in graph.inputs])
    caches = [(n.attrs.get("name", ""), n) for n in graph if n.op in KEPT]
    yield from _twice(graph, "cache", caches)
    for message, named in turns.problems(graph):
        yield Problem(graph.name, message, named)


def _twice(graph: Graph, what: str, named: list[tuple[str, Node]]) -> Iterator[Problem]:
    first: dict[str, Node] = {}
    for name, node in named:
        if name in first:
            message = f"{what} '{name}' is %{first[name].name}'s already"
            yield Problem(graph.name, message, node)
        first.setdefault(name, node)


def _node(program: Program, graph: Graph, node: Node, seen: set[str]) -> Iterator[str]:
    for operand in node.inputs:
        if operand not in seen:
            yield f"%{operand} is read before it is defined"
    edges = sorted((key, source) for source, _, key in graph.nx.in_edges(node.name, keys=True))
    if edges != list(enumerate(node.inputs)):
        yield f"expected the edges {list(enumerate(node.inputs))}, found {edges}"
    yield from _type(program, node.type)
    if node.op not in spec.TABLE:
        yield f"there is no op '{node.op}'"
        return
    row = spec.op(node)
    if len(node.inputs) < row.least or (row.most is not None and len(node.inputs) > row.most):
        least = f"{row.least} operands" if row.most == row.least else f"at least {row.least}"
        most = f" and at most {row.most}" if row.most not in (None, row.least) else ""
        yield f"expected {least}{most}, found {len(node.inputs)}"
    for name, attr in row.attrs.items():
        if name not in node.attrs:
            if attr.required:
                yield f"attribute '{name}' is missing: {attr.says}"
        elif not attr.holds(node.attrs[name]):
            yield f"attribute '{name}': expected {attr.says}, found {_shown(node.attrs[name])}"
    for name in node.attrs:
        if name not in row.attrs:
            yield f"{node.op} has no attribute '{name}'"
    for name in NAMES_OF_BODIES & row.attrs.keys():
        body = node.attrs.get(name)
        if isinstance(body, str) and body not in program.bodies:
            yield f"there is no body '{body}'"


def _shown(value: object) -> str:
    try:
        return show(value)
    except TypeError:
        return repr(value)


def _type(program: Program, type: Type) -> Iterator[str]:
    if type.dtype not in get_args(DType):
        yield f"'{type.dtype}' is not a dtype"
    for name, count in Counter(type.names).items():
        if count > 1:
            yield f"dim {name} occurs {count} times in {type}"
    if type.of is not None and type.dtype != "i64":
        yield f"a value of {type.dtype} indexes {type.of.name}; only i64 can"
    for dim in (*type.dims, *([type.of] if type.of else [])):
        yield from _dim(program, dim)


def _dim(program: Program, dim: Dim) -> Iterator[str]:
    for extent in (dim.size, dim.start):
        unknown = sorted(extent.names - DYNAMIC - program.sizes.keys())
        if unknown:
            yield f"dim {describe(dim)}: there is no constant '{unknown[0]}'"
        elif not extent.names & DYNAMIC:
            try:
                if extent.at(program.sizes) < 0:
                    yield f"dim {describe(dim)} is {extent.at(program.sizes)}"
            except ExtentError as error:
                yield f"dim {describe(dim)}: {error}"
    if dim.form == "atom":
        if dim.parts:
            yield f"dim {dim.name} is an atom with parts"
    else:
        whole = Dim.sum(dim.parts) if dim.form == "sum" else Dim.product(dim.parts)
        if whole.size != dim.size:
            yield f"dim {describe(dim)}: its parts make {whole.size}"
    for part in dim.parts:
        yield from _dim(program, part)


def _types(program: Program) -> Iterator[Problem]:
    """Each node's type against its rule, in each module that its body runs in."""
    try:
        places = list(spec.scopes(program))
    except RuleError as error:
        yield Problem(program.name, str(error))
        places = []
    reached = {graph.name for _, graph in places}
    for module in program.modules.values():
        for name in module.methods.values():
            if name not in reached:
                places.append((Scope(program, module.name), program.bodies[name]))
    told: set[tuple[str, str]] = set()
    for scope, graph in places:
        for node in graph:
            if (graph.name, node.name) in told:
                continue
            message = _mistyped(node, graph, scope)
            if message:
                told.add((graph.name, node.name))
                yield Problem(graph.name, message, node)


def _mistyped(node: Node, graph: Graph, scope: Scope) -> str:
    try:
        ruled = spec.inferred(node, graph, scope)
    except RuleError as error:
        return f"{error} (in module {scope.module})"
    if agrees(node.type, ruled):
        return ""
    differ = [
        f"{describe(own)} for {describe(dim)}"
        for dim in ruled.dims
        for own in node.type.dims
        if own.name == dim.name and own != dim
    ]
    why = f", with {', '.join(differ)}" if differ else ""
    return f"expected {ruled} by the rule of {node.op}, found {node.type}{why}"
