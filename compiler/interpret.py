"""The reference interpreter: runs a program op by op, on one sequence at a time.

It is what passes (``compiler/equivalence.py``) and backends are held against: no batch, no fusion,
no layout, only the meaning of each op (``compiler/semantics.py``). A run-time error names the line
of the ``.arch`` source that the value came from.

    interpreter = Interpreter(program, random_weights(program, seed=0))
    logits = interpreter.run("main", {"token": tokens})                # tokens: int64 [time]

    state = CacheState()                                               # stepwise
    interpreter.run("main", {"token": tokens[:5]}, state=state)
    interpreter.run("main", {"token": tokens[5:6]}, state=state)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compiler import spec
from compiler.ir import Dim, DType, Entry, Graph, Node, Parameter, Program, Type
from compiler.meanings import meaning
from compiler.rules import RuleError, Scope
from compiler.semantics import MeaningError, Named
from compiler.semantics_coded import stored
from compiler.signatures import block_rows, shape_of
from dsl.diagnostics import Span
from dsl.extents import ExtentError

Branches = Literal["guard", "then", "otherwise"]


class RunError(Exception):
    """A node cannot be evaluated; the message names its source line, body and module."""


@dataclass
class CacheState:
    """What one sequence has cached: for each ``cached`` name of each module, a tensor whose last
    axis is the history; for each ``scan``, its value at the last token. One state belongs to one
    entry point of one model."""

    length: int = 0
    stored: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    latest: dict[tuple[str, str], Named] = field(default_factory=dict)

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on.

        Raises:
            RunError: what a ``scan`` was at an earlier token is not known any more.
        """
        if self.latest and 0 < length < self.length:
            raise RunError(f"the state after {self.length} positions is kept, not after {length}")
        self.length = min(self.length, length)
        self.stored = {k: v[..., : self.length] for k, v in self.stored.items()}
        self.latest = self.latest if self.length else {}

    def copy(self) -> CacheState:
        """A second state that goes its own way (tensors are never written in place)."""
        return CacheState(self.length, dict(self.stored), dict(self.latest))


@dataclass(frozen=True)
class Step:
    """One run of an entry: ``time`` positions after ``past``; int64 ``wanted`` rows of these."""

    past: int
    time: int
    wanted: Tensor
    state: CacheState
    branches: Branches
    trace: dict[str, Tensor] | None
    known: dict[tuple[int, int], int] = field(default_factory=dict)  # sizes of dims, see Frame.size
    after: dict[tuple[str, str], Named] = field(default_factory=dict)  # states after its last token


class Interpreter:
    """Runs the entries of one program with one set of weights.

    Args:
        weights: each parameter's tensor under its path (``parameters`` lists them), in its stored
            shape, any float dtype; dims that are sums or products are one axis.
        act: the activation dtype. With float64 everything is computed in it, f32 values included;
            otherwise in float32, and where a plain name rounds, its value is rounded to ``act``.
        sizes: constants' values where they are other than the program's.
        coded: weights that the program keeps as codes are what these stand for already, and are
            not quantised here.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        act: torch.dtype = torch.float32,
        sizes: Mapping[str, int] | None = None,
        coded: bool = False,
    ):
        self.program = program
        self.coded = coded
        self.weights = weights
        self.act = act
        self.compute = torch.float64 if act == torch.float64 else torch.float32
        self.sizes = {**program.sizes, **(sizes or {})}
        self.spans: dict[str, Span | None] = {}  # of each value traced so far
        self.member: Any = None  # its rank (compiler/ranked.py), in a program of ranks

    def run(
        self,
        entry: str,
        inputs: Mapping[str, Tensor],
        *,
        state: CacheState | None = None,
        rows: Sequence[int] | Tensor | None = None,
        trace: dict[str, Tensor] | None = None,
        branches: Branches = "guard",
    ) -> Tensor:
        """Run one step of an entry; see ``value``, whose result this is as a tensor.

        Returns:
            The entry's result, dims in the order of its type, in ``act`` if that is its dtype.
        """
        result = self.value(entry, inputs, state=state, rows=rows, trace=trace, branches=branches)
        act = self.program.bodies[self.program.entries[entry].body].result.type.dtype == "act"
        return result.tensor.to(self.act) if act else result.tensor

    def value(
        self,
        entry: str,
        inputs: Mapping[str, Tensor],
        *,
        state: CacheState | None = None,
        rows: Sequence[int] | Tensor | None = None,
        trace: dict[str, Tensor] | None = None,
        branches: Branches = "guard",
    ) -> Named:
        """Run one step of an entry.

        Args:
            inputs: a tensor per input, without batch: ``token`` is int64 [time]. An input that is
                another one shifted may be left out: it is taken from that, and the last rows, for
                which there is none, are dropped.
            state: what was cached before; this step's positions are added to it.
            rows: which positions of the step are wanted (all); only these are in the result where
                the program selects rows.
            trace: filled with every labelled value by its path (``layers[3].attn.c_kv``).
            branches: which side of each branch runs, instead of what its guard says.

        Returns:
            The entry's result, which may be a bundle; a tensor's dims are in the order of its type.

        Raises:
            RunError: something is missing, or does not fit.
        """
        if entry not in self.program.entries:
            raise RunError(f"there is no entry '{entry}'")
        point = self.program.entries[entry]
        body = self.program.bodies[point.body]
        given = shifted(point, body, inputs)
        state = CacheState() if state is None else state
        time = _time(body, given)
        wanted = torch.arange(time) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
        step = Step(state.length, time, wanted, state, branches, trace)
        lengths = {"time": time, "history": state.length + time, "wanted": len(wanted)}
        scope = Scope(self.program, self.program.root)
        root = Frame(self, body, scope, "", {**self.sizes, **lengths}, step, {})
        arguments = {
            n.attrs["name"]: Named(given[n.attrs["name"]], n.type.names) for n in body.inputs
        }
        result = replace(root, arguments=arguments).evaluate()
        state.length += time
        state.latest.update(step.after)
        return result


@dataclass(frozen=True)
class Frame:
    """One run of one body: where it is in the module tree, and what it was given."""

    interpreter: Interpreter
    graph: Graph
    scope: Scope
    path: str  # of the module: "layers[3].attn", "" for the root
    sizes: Mapping[str, int]  # constants, and the step's lengths
    step: Step
    arguments: Mapping[str, Named]

    def size(self, dim: Dim) -> int:
        # Evaluating polynomials took a third of a run. Within a step only ``rows`` changes.
        key = (id(dim), self.sizes.get("rows", 0))
        known = self.step.known.get(key)
        if known is None:
            known = self.step.known[key] = dim.size.at(self.sizes)
        return known

    def dtype(self, dtype: DType) -> torch.dtype:
        """The dtype in which values are held: act values too are computed in float32 or wider."""
        if dtype == "i64":
            return torch.int64
        return torch.bool if dtype == "bool" else self.interpreter.compute

    def rounded(self, tensor: Tensor, node: Node) -> Tensor:
        """A named value is rounded to the activation dtype, an anonymous or ``let`` one is not."""
        if node.rounds and node.type.dtype == "act":
            return tensor.to(self.interpreter.act).to(tensor.dtype)
        return tensor

    def parameter(self, name: str, type: Type) -> Tensor:
        """A weight; one that is stored as codes is what these stand for."""
        path = join(self.path, name)
        if path not in self.interpreter.weights:
            raise MeaningError(f"there is no weight '{path}'")
        tensor = self.interpreter.weights[path]
        shape = [self.size(d) for d in type.dims]
        if list(tensor.shape) != shape:
            raise MeaningError(f"weight '{path}' is {list(tensor.shape)}, not {type} = {shape}")
        coding = self.scope.parameter(name).coding
        if coding is not None and not self.interpreter.coded:
            tensor = stored(tensor.to(self.interpreter.compute), coding)
        if type.dtype == "act":
            tensor = tensor.to(self.interpreter.act)
        return tensor.to(self.dtype(type.dtype))

    def append(self, name: str, new: Tensor) -> Tensor:
        """Put this step's positions (last axis) behind those cached before; returns all."""
        stored, key = self.step.state.stored, (self.path, name)
        if self.step.past:
            if key not in stored or stored[key].shape[-1] < self.step.past:
                raise MeaningError(f"'{name}' is not cached for {self.step.past} positions")
            # A body may run twice in a step: both times it appends after the past.
            new = torch.cat([stored[key][..., : self.step.past], new], dim=-1)
        stored[key] = new
        return new

    def recalled(self, name: str, start: Named) -> Named:
        """What a scan was at the last token of the step before, or what it begins with."""
        if not self.step.past:
            return start
        if (self.path, name) not in self.step.state.latest:
            raise MeaningError(f"the state of '{name}' is not kept")
        return self.step.state.latest[self.path, name]

    def keep(self, name: str, state: Named, traces: list[dict[str, Tensor]]) -> None:
        """Keep a scan's last state, and what was traced token by token, along time in front."""
        self.step.after[self.path, name] = state
        if self.step.trace is not None and traces:
            for path in traces[0]:
                self.step.trace[path] = torch.stack([trace[path] for trace in traces])

    def traced_alone(self) -> Frame:
        """The frame with a trace of its own, if there is one."""
        if self.step.trace is None:
            return self
        return replace(self, step=replace(self.step, trace={}))

    def run(
        self,
        body: str,
        args: list[Named],
        child: str = "",
        number: int | None = None,
        dims: Iterable[tuple[str, str]] = (),
        **lengths: int,
    ) -> Named:
        """Run another body, of this module or a child.

        Args:
            args: in the order of its inputs, under the caller's names of dims.
            number: which one of an array of children.
            dims: (the body's name, the caller's name) of dims that are called differently.
        """
        graph = self.scope.body(body)
        inside = replace(self, graph=graph, sizes={**self.sizes, **lengths})
        if child:
            inside = replace(
                inside,
                scope=self.inside(child, number),
                path=join(self.path, child if number is None else f"{child}[{number}]"),
            )
        outside = dict(dims)
        arguments = {}
        for node, value in zip(graph.inputs, args, strict=True):
            order = tuple(outside.get(d, d) for d in node.type.names)
            arguments[node.attrs["name"]] = value.under(order, node.type.names)
        return replace(inside, arguments=arguments).evaluate().called(outside)

    def run_block(
        self,
        body: str,
        args: list[Named],
        child: str,
        number: int,
        dims: Iterable[tuple[str, str]],
        rows: int,
    ) -> Named:
        """Run one block of an array on its rows, which lie along a dim called ""."""
        names = {**dict(dims), block_rows(self.scope.body(body)): ""}
        return self.run(body, args, child, number, names.items(), rows=rows)

    def inside(self, child: str, number: int | None) -> Scope:
        path, _, child = child.rpartition(".")
        for piece in self.scope.inside(path).pieces(child):
            if piece.array is None:
                if number is None:
                    return replace(self.scope, module=piece.module)
            elif number is not None:
                start = piece.array.start.at(self.sizes)
                if start <= number < start + self.size(piece.array):
                    return replace(self.scope, module=piece.module)
        raise MeaningError(f"module {self.scope.module} has no child {child}[{number}]")

    def evaluate(self) -> Named:
        """Every node of the body, in order; returns the body's result."""
        values: dict[str, Named] = {}
        for node in self.graph:
            try:
                values[node.name] = self._value(node, [values[i] for i in node.inputs])
            except RunError:
                raise
            except (MeaningError, RuleError, ExtentError, RuntimeError, LookupError) as error:
                raise RunError(f"{self._place(node)}: {error}") from error
            if self.step.trace is not None and node.label:
                path = join(self.path, node.label)
                self.step.trace[path] = values[node.name].tensor
                self.interpreter.spans[path] = node.span
        return values[self.graph.output]

    def _value(self, node: Node, args: list[Named]) -> Named:
        result: Named = meaning(spec.op(node).semantics)(node, args, self)
        if node.type.dtype == "bundle":
            return result
        tensor = result.to(node.type.names)
        shape = shape_of(node.type, tensor.shape, self)
        if list(tensor.shape) != shape:
            raise MeaningError(f"the result is {list(tensor.shape)}, its type {node.type} {shape}")
        tensor = self.rounded(tensor.to(self.dtype(node.type.dtype)), node)
        return Named(tensor, node.type.names)

    def _place(self, node: Node) -> str:
        where = f" at {self.path}" if self.path else ""
        line = f"{node.span}: " if node.span else ""
        return f"{line}%{node.name} = {node.op} in {self.graph.name}{where}"


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# -- an entry's arguments --------------------------------------------------------------------------


def _time_axis(node: Node) -> int | None:
    kinds = [d.kind for d in node.type.dims]
    return kinds.index("time") if "time" in kinds else None


def _time(body: Graph, given: Mapping[str, Tensor]) -> int:
    """How many positions the inputs ask for."""
    for node in body.inputs:
        axis = _time_axis(node)
        if axis is not None:
            return given[node.attrs["name"]].shape[axis]
    raise RunError(f"no input of {body.name} runs over time")


def shifted(entry: Entry, body: Graph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All inputs of an entry: those that are others shifted along time are made from these, and
    rows that one of them lacks are dropped.

    Raises:
        RunError: an input is missing, or no row is left.
    """
    axes = {n.attrs["name"]: _time_axis(n) for n in body.inputs}
    made = dict(inputs)
    rows = None
    for item in entry.inputs:
        if item.name in made:
            continue
        source, axis = item.shift_of, axes.get(item.name)
        if source is None or source not in inputs or axis is None or item.shift < 0:
            raise RunError(f"entry '{entry.name}' needs the input '{item.name}'")
        left = inputs[source].shape[axis] - item.shift
        if left < 1:
            raise RunError(f"'{item.name}' is '{source}' {item.shift} later: there is none")
        made[item.name] = inputs[source].narrow(axis, item.shift, left)
        rows = left if rows is None else min(rows, left)
    if rows is not None:
        for name, axis in axes.items():
            if axis is not None:
                made[name] = made[name].narrow(axis, 0, rows)
    return made


# -- weights ---------------------------------------------------------------------------------------


def parameters(
    program: Program, sizes: Mapping[str, int] | None = None
) -> Iterator[tuple[str, Parameter]]:
    """Every stored tensor with its path, ``layers[3].mlp.expert[5].W_gate``: arrays are numbered
    out, so this is for small instances."""
    sizes = {**program.sizes, **(sizes or {})}

    def walk(module: str, path: str) -> Iterator[tuple[str, Parameter]]:
        for parameter in program.modules[module].parameters:
            yield join(path, parameter.name), parameter
        for child in program.modules[module].children:
            if child.array is None:
                yield from walk(child.module, join(path, child.name))
                continue
            start = child.array.start.at(sizes)
            for number in range(start, start + child.array.size.at(sizes)):
                yield from walk(child.module, join(path, f"{child.name}[{number}]"))

    yield from walk(program.root, "")


def random_weights(
    program: Program,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Random weights, each a function of (seed, path) alone.

    Matrices keep the size of what they multiply (their last dim is what is summed, as checkpoints
    store them); vectors are near 1, as gains are; states are small.
    """
    sizes = {**program.sizes, **(sizes or {})}
    weights = {}
    for path, parameter in parameters(program, sizes):
        digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        shape = [d.size.at(sizes) for d in parameter.type.dims]
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if parameter.role == "state":
            value = value * 0.1
        elif len(shape) > 1:
            value = value / max(shape[-1], 1) ** 0.5
        else:
            value = 1 + value * 0.1
        weights[path] = value.to(dtype)
    return weights
