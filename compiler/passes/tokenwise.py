"""Recurrences as loops over the tokens of a step: what training makes of a ``scan``.

A ``scan`` keeps its state from step to step. Training takes whole sequences, so that it is a loop
over time that carries the state and gives one result for each token, and its backward pass is the
same loop from the last token to the first. All tokens' states are saved; nothing chunks them.
"""

from __future__ import annotations

from dataclasses import replace

from compiler.ir import Graph, Node, Program, Rewriter, Type


def run(program: Program) -> Program:
    """The program with a loop for each scan, and a body for one token of each."""
    bodies: dict[str, Graph] = {}
    for graph in program.bodies.values():
        if any(n.op == "scan" for n in graph):
            graph, tokens = _without_scans(program, graph)
            bodies |= {token.name: token for token in tokens}
        bodies[graph.name] = graph
    return replace(program, bodies=bodies)


def _without_scans(program: Program, graph: Graph) -> tuple[Graph, list[Graph]]:
    rewriter = Rewriter(graph)
    tokens: list[Graph] = []
    for node in graph:
        if node.op != "scan":
            rewriter.replace(node.name, rewriter.copy(node).name)
            continue
        (time,) = (d for d in node.type.dims if d.kind == "time")
        token = _token(program, graph, node)
        tokens.append(token)
        start = rewriter.new[rewriter.to[node.inputs[0]]]
        state = token.inputs[0].type
        missing = tuple(d for d in state.dims if d.name not in start.type.names)
        if missing:
            full = Type(state.dtype, (*missing, *start.type.dims))
            start = rewriter.emit(
                f"{node.name}.start", "expand", [start.name], full, attrs={"dims": missing}
            )
        operands = [start.name, *(rewriter.to[i] for i in node.inputs[1:])]
        moving = [time in rewriter.new[name].type.dims for name in operands]
        loop = rewriter.emit(
            f"{node.name}.tokens",
            "loop",
            operands,
            token.result.type,
            attrs={
                "body": token.name,
                "child": "",
                "index": time,
                "dims": (),
                "each": tuple(i for i, moves in enumerate(moving) if moves),
                "carry": ((0, 0),),
                "sum": (),
                "reverse": False,
            },
            span=node.span,
        )
        value = node.with_(op="item", inputs=(loop.name,), attrs={"at": 1})
        rewriter.replace(node.name, rewriter.new.add(value).name)
    return rewriter.done(), tokens


def _token(program: Program, graph: Graph, scan: Node) -> Graph:
    """One token: from the state and one of each operand to the state after it and what it gives."""
    a = scan.attrs
    (time,) = (d for d in scan.type.dims if d.kind == "time")
    out = Graph(f"{a['body']}.token")
    state = program.bodies[a["body"]].inputs[0].type
    names = [out.add(Node("before", "input", (), state, {"name": "before"})).name]
    for position, operand in enumerate(graph.operands(scan)[1:], 1):
        type = operand.type
        one = Type(type.dtype, tuple(d for d in type.dims if d != time), type.of)
        name = f"x{position}"
        names.append(out.add(Node(name, "input", (), one, {"name": name}, operand.span)).name)

    def ran(name: str, body: str, operands: list[str]) -> str:
        attrs = {"body": body, "child": "", "dims": ()}
        type = program.bodies[body].result.type
        return out.add(Node(name, "call", tuple(operands), type, attrs, scan.span)).name

    after = ran("after", a["body"], [names[0], *(names[i] for i in a["given"])])
    given = after
    if a.get("read"):
        given = ran("given", a["read"], [after, *(names[i] for i in a.get("asked", ()))])
    bundle = Type("bundle", (), bundle=f"{out.name}:both")
    out.output = out.add(Node("both", "pack", (after, given), bundle)).name
    return out
