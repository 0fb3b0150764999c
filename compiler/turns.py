"""Two micro-batches that take turns in a body, and values that are in flight.

A body is written for one sequence; which sequences run through it together is the backend's affair.
Where a body has ``turns``, its sequences may be dealt out to two micro-batches, and the turns say
which nodes of which micro-batch run after which: while one computes, what the other has sent is on
its way.

    turn first %1 %2 %x.sent        # what the first one computes and starts
    turn before                     # what the run of the body before left to do for the second one
    turn second %1 %2 %x.sent
    turn first %x.rows %out %y
    turn second %x.rows %out
    turn later %y                   # left to the next run of the body, or to who runs it last

Every node stands once in the turns of each micro-batch, but for inputs and what depends on none of
them, which both share. Sequences do not see each other, so any such order computes the same: what
the verifier checks here, that no value is read before it is there, is all that there is to prove.

``starts`` on what ranks do together says that it is only begun there; ``wait`` has its value. All
ranks run one program, so they start in one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast, get_args

from compiler.ir import Graph, Node, Turn, Who

if TYPE_CHECKING:
    from compiler.parse import _Line as Line

# Read while it is in flight, by what sends along it: the same stream does both in turn.
ALONG = frozenset({"dispatch", "apply", "combine"})


def read_turn(line: Line) -> Turn:
    """What follows ``turn`` in a body's text."""
    who = line.word()
    if who not in get_args(Who):
        line.fail(f"'{who}' is no micro-batch")
    nodes = []
    while line.take("%"):
        nodes.append(line.word())
    return Turn(cast(Who, who), tuple(nodes))


def shared(graph: Graph) -> frozenset[str]:
    """Nodes that are the same for every micro-batch: arguments that do not run over the step's
    tokens or their history, and what depends on no argument or position."""
    own: set[str] = set()
    for node in graph:
        varies = any(d.kind in ("time", "history", "rows") for d in node.type.dims)
        if varies or any(i in own for i in node.inputs) or node.op in ("call", "chain", "branch"):
            own.add(node.name)
    return frozenset(n.name for n in graph if n.name not in own)


def problems(graph: Graph) -> Iterator[tuple[str, Node | None]]:
    """What is wrong with the turns of a body and with its values in flight."""
    for node in graph:
        for operand in node.inputs:
            if operand not in graph or not graph[operand].attrs.get("starts"):
                continue
            along = graph[operand].op == "routing" and node.op in ALONG
            if not along and node.op != "wait":
                yield f"%{operand} is read while it is in flight, without a wait", node
    if graph.output in graph and graph.result.attrs.get("starts"):
        yield f"%{graph.output} is given while it is in flight", graph.result
    if graph.turns:
        yield from _turns(graph)


def _turns(graph: Graph) -> Iterator[tuple[str, Node | None]]:
    both = shared(graph)
    arguments = {n.name for n in graph.inputs}
    wanted = {n.name for n in graph} - both - arguments
    whos = [turn.who for turn in graph.turns]
    if whos.count("before") != whos.count("later") or whos.count("later") > 1:
        yield "a turn 'later' needs a turn 'before', and there is one at most", None
        return
    if "later" in whos and whos[-1] != "later":
        yield "the turn 'later' is the last", None
    ready = {"first": both | arguments, "second": set(both)}
    if "before" not in whos:
        ready["second"] |= arguments
    for turn in graph.turns:
        who: str = "second" if turn.who == "later" else turn.who
        if who == "before":
            ready["second"] |= arguments
            continue
        for name in turn.nodes:
            if name not in wanted:
                yield f"turn {turn.who}: %{name} is not a node that it runs", None
                continue
            if name in ready[who]:
                yield f"turn {turn.who}: %{name} runs twice", graph[name]
            missing = [i for i in graph[name].inputs if i not in ready[who]]
            if missing:
                yield f"turn {turn.who}: %{missing[0]} is not there yet", graph[name]
            ready[who] = ready[who] | {name}
    for who, done in ready.items():
        for name in sorted(wanted - done):
            yield f"no turn of the {who} micro-batch runs %{name}", graph[name]
