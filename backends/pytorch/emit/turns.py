"""Two micro-batches that take turns: a method of their own, and the loop over layers that runs it.

    for layer in self.layers:
        x, late = layer.turns(first, second, x, late, cos, cos_2)

The values of the second one have names with a number. What it leaves to the next layer is a
function, ``late``, which has its result when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.coded import annotation
from backends.pytorch.emit.text import Text, call, wrapped
from backends.pytorch.emit.values import Value
from compiler import spec
from compiler.ir import Graph, Node
from compiler.turns import shared

if TYPE_CHECKING:
    from backends.pytorch.emit.classes import ClassWriter

SECOND = "2/"  # in front of the second micro-batch's nodes
LATE = "Callable[[], Tensor]"


@dataclass(frozen=True)
class Turns:
    """A method that has been written: ``late`` if the second micro-batch's argument and result are
    functions."""

    name: str
    lines: tuple[str, ...]
    late: bool


def varies(node: Node) -> bool:
    """Whether an argument has rows of each sequence."""
    return any(d.kind in ("time", "history") for d in node.type.dims)


def written(owner: ClassWriter, graph: Graph, take: Callable[[str], str]) -> Turns:
    """The method of a body's turns; ``take`` hands out names of methods."""
    body = _Both(owner, graph)
    body.write_turns()
    first = body.variable_of(graph.output)
    name = take("turns")
    if body.rest:
        second, more = _later(owner, body, take)
    else:
        second, more = str(body.variable_of(body.second(graph.output))), []
    given = [
        f"{name}: {LATE if name == body.late else annotation(node.type.dtype)}"
        for name, node in body.arguments
    ]
    steps = [f"{step}: Step" for step in body.steps]
    gives = f"tuple[Tensor, {LATE if body.rest else 'Tensor'}]"
    head = f"def {name}({', '.join(['self', *steps, *given])}) -> {gives}:"
    doc = '        """Two micro-batches: one computes while the other\'s rows are on their way."""'
    end = wrapped(f"return {first}, {second}", 8)
    lines = (*wrapped(head, 4), doc, *body.lines, *end)
    return Turns(name, (*lines, *more), bool(body.rest))


def _later(owner: ClassWriter, body: _Both, take: Callable[[str], str]) -> tuple[str, list[str]]:
    """What the second micro-batch leaves to the next run: an expression of a function that does it,
    and the lines of the method that is behind it."""
    graph, inside = body.one, body.rest
    needed = set(inside)
    for node in reversed(list(graph)):
        if node.name in inside or (node.name in needed and node.name in body.shared_nodes):
            needed.update(node.inputs)
    alone = Graph(f"{graph.name}.later")
    values: dict[str, Value] = {}
    for node in (n for n in graph if n.name in needed):
        own = node.name in inside or (node.name in body.shared_nodes and node.op != "input")
        if not own:
            values[node.name] = value = body.variable_of(body.second(node.name))
            attrs = {"name": str(value), "starts": bool(node.attrs.get("starts"))}
            node = Node(node.name, "input", (), node.type, attrs, node.span)
        alone.add(node)
    alone.output = graph.output
    rest = Body(owner, alone)
    for name, node in rest.parameters:
        rest.values[node.name] = replace(values[node.name], text=Text(name))
    rest.run()
    given = [
        f"{n}: {'Pending' if p.attrs['starts'] else annotation(p.type.dtype)}"
        for n, p in rest.parameters
    ]
    name = take("_later")
    step = [f"{rest.step}: Step"] if rest.needs_step else []
    passed = [body.steps[1]] if rest.needs_step else []
    passed += [str(values[p.name]) for _, p in rest.parameters]
    head = f"def {name}({', '.join(['self', *step, *given])}) -> Tensor:"
    doc = '        """What is left to do for the second micro-batch."""'
    text = str(call("partial", f"self.{name}", *passed))
    return text, ["", *wrapped(head, 4), doc, *rest.lines]


class _Both(Body):
    """A body with the nodes of both micro-batches, in the order of their turns."""

    def __init__(self, owner: ClassWriter, graph: Graph):
        self.one = graph
        self.shared_nodes = shared(graph)
        self.rest = {n for turn in graph.turns if turn.who == "later" for n in turn.nodes}
        super().__init__(owner, self._unrolled(graph))
        self.steps = (self.step, self.names.take(self.step))
        self.late = self.names.take("late") if self.rest else ""
        first = SECOND + graph.inputs[0].name
        self.arguments = [
            (self.late if self.late and node.name == first else name, node)
            for name, node in self.parameters
        ]

    def second(self, name: str) -> str:
        """What a node is called of the second micro-batch."""
        node = self.one[name]
        shared_here = name in self.shared_nodes or (node.op == "input" and not varies(node))
        return name if shared_here else SECOND + name

    def _unrolled(self, graph: Graph) -> Graph:
        """One graph with the nodes of both; those that they share stand once."""
        made = Graph(graph.name)
        for node in graph:
            if node.op != "input" and node.name not in self.shared_nodes:
                continue
            made.add(node)
            if self.second(node.name) != node.name:
                attrs = {**node.attrs, "name": f"{node.attrs['name']}.2"}
                made.add(node.with_(name=self.second(node.name), attrs=attrs))
        for turn in graph.turns:
            for name in turn.nodes if turn.who in ("first", "second") else ():
                node = graph[name]
                if turn.who == "second":
                    inputs = tuple(map(self.second, node.inputs))
                    node = node.with_(name=self.second(name), inputs=inputs)
                made.add(node)
        made.output = graph.output
        return made

    def results(self, graph: Graph) -> list[str]:
        """What is read after the turns: by the caller, and by what is left for later."""
        if graph.name != self.one.name or SECOND + self.one.inputs[0].name not in graph:
            return super().results(graph)
        left = [i for n in self.one if n.name in self.rest for i in n.inputs if i not in self.rest]
        found = [self.second(i) for i in dict.fromkeys(left)]
        return [graph.output, *(found or [self.second(graph.output)])]

    def write_turns(self) -> None:
        for node in self._order:
            if node.name in self.shared_nodes:
                self.write(node)
        for turn in self.one.turns:
            if turn.who == "before":
                x = self.values[self.second(self.one.inputs[0].name)]
                self.line(f"{x} = {self.late}()", None)
            if turn.who not in ("first", "second"):
                continue
            self.step = self.steps[turn.who == "second"]
            for name in turn.nodes:
                name = name if turn.who == "first" else self.second(name)
                if name in self.nodes:
                    self.write(self.nodes[name])

    def variable_of(self, name: str) -> Value:
        """A value under a name."""
        value = self.values[name]
        return value if value.cheap else self.bind(self.nodes[name])


def settle(body: Body) -> None:
    """Compute now what is to be computed before a transfer is started, or waited for."""
    left = {i for n in body.nodes.values() if n.name not in body.values for i in n.inputs}
    left.update(body.results(body.graph))
    for name in [n for n in body.values if n in left and n in body.nodes]:
        node, value = body.nodes[name], body.values[name]
        fixed = node.op in ("input", "param", "state", "constant") or name in body.tables
        if fixed or value.cheap or value.matrix is not None or body.has_variable(name):
            continue
        if spec.op(node).view and body.values[node.inputs[0]].cheap:
            continue
        body.bind(node)


def chain(
    body: Body, node: Node, turns: Turns, graph: Graph, values: Sequence[Value], loop: str
) -> None:
    """The loop over layers in which two micro-batches take turns, if the step is two.

    Args:
        values: what the first layer gets, and what all of them get; packed or plain.
        loop: ``for layer in self.layers``.
    """
    step, name = body.runtime_step, str(values[0])
    first, second = body.names.take("first"), body.names.take("second")
    given: list[str] = []
    lines = [f"{first}, {second} = {step}.halves"]
    for at, (value, argument) in enumerate(zip(values, graph.inputs, strict=True)):
        time = body.axis_of(value, "time")
        if time is None:
            given.append(str(value))
            continue
        axis = [str(value.axis(time))] if value.axis(time) else []
        stem = name if at == 0 else f"{body.stem(argument)}_1"
        one = name if at == 0 else body.names.take(stem)
        two = body.names.take(name if at == 0 else f"{body.stem(argument)}_2")
        lines.append(f"{one}, {two} = {call(f'{step}.parted', str(value), *axis)}")
        if at == 0 and turns.late:
            late = body.names.take("late")
            lines.append(f"{late} = arrived({two})")
            two = late
        given += [one, two]
    item = loop.split()[1]
    both = f"{given[0]}, {given[1]}"
    axis = [str(values[0].axis(str(body.axis_of(values[0], "time"))))]
    last = f"{given[1]}()" if turns.late else given[1]
    body.line(f"if {step}.halves:", node.span)
    body.indent += 4
    for line in lines:
        body.line(line, node.span)
    body.line(loop, node.span)
    body.indent += 4
    body.line(f"{both} = {call(f'{item}.{turns.name}', first, second, *given)}", node.span)
    body.indent -= 4
    body.line(f"{name} = {call('torch.cat', f'({given[0]}, {last})', *axis)}", node.span)
    body.indent -= 4
    body.line("else:", node.span)
