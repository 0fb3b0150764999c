"""The loss that a training deployment means: the mean cross-entropy of the next token.

The language has no losses yet (docs/language.md, 17). Until then each entry whose result is over
the places of one of its inputs is a prediction of that input: of the next token, or, where the
entry reads later ones too (``after = token + 1``), of the one after these. The loss is the sum of
their means, each times the deployment's ``weight[ENTRY]``. What the entries have in common (the
layers below several predictions) is computed once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

from compiler.adjoints import Emitter
from compiler.errors import UserError
from compiler.ir import Dim, Entry, EntryInput, Graph, Node, Program, Rewriter, Type
from compiler.rules import Scope

NAME = "loss"


def add(program: Program, weights: Mapping[str, float]) -> Program:
    """The program with an entry ``loss``, whose inputs are those of the entries and their targets.

    Args:
        weights: what each entry's loss counts; 1 if it is not named, 0 leaves it out.

    Raises:
        UserError: an entry's result is not a prediction, or there is an entry of that name.
    """
    if NAME in program.entries:
        raise UserError(f"entry '{NAME}': the loss of a training deployment has this name")
    chosen = [e for e in program.entries.values() if weights.get(e.name, 1.0)]
    if not chosen:
        raise UserError("a training deployment leaves out the loss of every entry")
    work = _Loss(program)
    terms = [work.entry(entry, weights.get(entry.name, 1.0)) for entry in chosen]
    total = terms[0]
    work.e.stem = "total"
    for term in terms[1:]:
        total = work.e.map("add", total, term)
    work.graph.output = total.name
    made = Entry(NAME, work.graph.name, tuple(work.inputs.values()))
    return replace(
        program,
        bodies={**program.bodies, work.graph.name: work.graph, work.entropy.name: work.entropy},
        entries={**program.entries, NAME: made},
    )


class _Loss:
    def __init__(self, program: Program):
        self.program = program
        name = f"{program.root}.{NAME}"
        self.graph = Graph(name)
        self.entropy = Graph(f"{name}.cross_entropy")
        self.e = Emitter(self.graph, Scope(program, program.root))
        self.inputs: dict[str, EntryInput] = {}
        self.seen: dict[Hashable, str] = {}

    def entry(self, entry: Entry, weight: float) -> Node:
        """An entry's mean cross-entropy, times its weight: a number."""
        body = self.program.bodies[entry.body]
        source, over = _predicted(entry, body)
        name = source.attrs["name"]
        ahead = 1 + max([0, *(i.shift for i in entry.inputs if i.shift_of == name)])
        self._arguments(entry, body)
        target = self._target(source, ahead)
        logits = self._inlined(body)
        self.e.stem = f"{entry.name}_loss"
        rows = [d for d in logits.type.dims if d.kind == "rows"]
        if rows:
            target = self.e.add("select_rows", [target], Type("i64", tuple(rows), over))
        loss = self._cross_entropy(self.e.cast(logits, "f32"), target, over)
        mean = self.e.sum(loss, loss.type.names, "mean")
        return self.e.map("mul", mean, self.e.constant(float(weight)))

    def _arguments(self, entry: Entry, body: Graph) -> None:
        """The entry's inputs come before anything is computed of them, each name once."""
        for item, node in zip(entry.inputs, body.inputs, strict=True):
            if self.inputs.setdefault(item.name, item) != item:
                raise UserError(
                    f"entry '{entry.name}': another entry's input '{item.name}' differs"
                )
            if item.name not in self.graph:
                self.graph.add(node.with_(name=item.name, label=None))

    def _target(self, source: Node, ahead: int) -> Node:
        item = EntryInput(f"target_{ahead}", source.attrs["name"], ahead)
        if item.name in self.graph and self.inputs.get(item.name) != item:
            raise UserError(f"input '{item.name}': the loss of a training deployment has this name")
        self.inputs[item.name] = item
        if item.name in self.graph:
            return self.graph[item.name]
        return self.graph.add(Node(item.name, "input", (), source.type, {"name": item.name}))

    def _inlined(self, body: Graph) -> Node:
        """The nodes of an entry; those that another entry has too are there once. Nothing in a
        whole sequence's run depends on what ran before, a call least of all."""
        rewriter = Rewriter(body)
        rewriter.new = self.graph
        labels = {n.label for n in self.graph}
        for node in body:
            if node.op == "input":
                rewriter.replace(node.name, node.attrs["name"])
                continue
            inputs = tuple(rewriter.to[i] for i in node.inputs)
            attrs = tuple((k, v, type(v)) for k, v in sorted(node.attrs.items()) if k != "frees")
            key = (node.op, inputs, node.type, attrs)
            if key not in self.seen:
                label = None if node.label in labels else node.label
                own = {k: v for k, v, _ in attrs}
                self.seen[key] = rewriter.copy(node, label=label, attrs=own).name
            rewriter.replace(node.name, self.seen[key])
        return self.graph[rewriter.to[body.output]]

    def _cross_entropy(self, logits: Node, target: Node, over: Dim) -> Node:
        """log(sum(exp(logits))) - logits[target], each position's; one kernel forward, one back."""
        if not len(self.entropy):
            inside = Emitter(self.entropy, self.e.scope)
            own = [
                self.entropy.add(Node(name, "input", (), n.type, {"name": name}))
                for name, n in (("logits", logits), ("target", target))
            ]
            inside.stem = "entropy"
            z, at = own
            high = inside.sum(z, [over.name], "max")
            beyond = inside.map("exp", inside.map("sub", z, high))
            lse = inside.map("add", inside.map("log", inside.sum(beyond, [over.name])), high)
            chosen = inside.add("gather", [z, at], dim=over.name)
            self.entropy.output = inside.map("sub", lse, chosen).name
        left = tuple(d for d in logits.type.dims if d.name != over.name)
        attrs = {"body": self.entropy.name, "over": over.name}
        return self.e.add("cross_entropy", [logits, target], Type("f32", left), **attrs)


def _predicted(entry: Entry, body: Graph) -> tuple[Node, Dim]:
    """The input whose next values the result is over, and the dim of its places."""
    made = {i.name for i in entry.inputs if i.shift_of is not None}
    dims = {(d.name, d.size) for d in body.result.type.dims}
    found = [
        n
        for n in body.inputs
        if n.type.of is not None
        and (n.type.of.name, n.type.of.size) in dims
        and n.attrs["name"] not in made
        and [d.kind for d in n.type.dims] == ["time"]
    ]
    if len(found) != 1 or body.result.type.dtype not in ("act", "f32"):
        raise UserError(
            f"entry '{entry.name}': its result predicts no input: a training deployment's loss is "
            f"the cross-entropy of entries that give numbers over the places of one of their "
            f"inputs; weight[{entry.name}] = 0 leaves it out"
        )
    (source,) = found
    assert source.type.of is not None
    return source, source.type.of
