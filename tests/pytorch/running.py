"""Run an emitted model beside the reference interpreter, on the same weights and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from backends.pytorch.emit.module import emit
from backends.pytorch.model import attribute_path
from backends.pytorch.runtime import Cache, Step
from compiler.interpret import CacheState, Interpreter, random_weights
from compiler.ir import Program
from compiler.shrink import shrink


def tiny(program: Program) -> Program:
    """The program with small constants that are odd where they can be."""
    return replace(program, constants={**program.constants, **shrink(program)})


def made(
    program: Program, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The emitted model, with these weights."""
    scope: dict[str, Any] = {}
    text = emit(program)
    exec(compile(text, "model.py", "exec"), scope)
    model: nn.Module = scope["build"](device="cpu", dtype=dtype)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert own.keys() == {attribute_path(path) for path in weights}
    with torch.no_grad():
        for path, tensor in weights.items():
            own[attribute_path(path)].copy_(tensor)
    return model


class Both:
    """One program, run by the interpreter and as emitted."""

    def __init__(
        self,
        program: Program,
        reference: Program | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        self.program = program
        self.weights = random_weights(reference or program, seed)
        self.interpreter = Interpreter(reference or program, self.weights)
        self.model = made(program, self.weights, dtype)

    def owned(self, path: str) -> Tensor:
        """The emitted model's parameter or buffer of that path in the source."""
        owner, _, name = attribute_path(path).rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(owner), name)
        return tensor

    def inputs(self, entry: str, counts: Sequence[int], seed: int = 0) -> list[dict[str, Tensor]]:
        """Random inputs of an entry, one set per sequence."""
        generator = torch.Generator().manual_seed(seed)
        body = self.program.bodies[self.program.entries[entry].body]
        out = []
        for count in counts:
            given = {}
            for node in body.inputs:
                sizes = {**self.program.sizes, "time": count}
                shape = [d.size.at(sizes) for d in node.type.dims]
                if node.type.of is not None:
                    high = self.program.size(node.type.of)
                    value = torch.randint(high, shape, generator=generator)
                else:
                    value = torch.randn(shape, generator=generator)
                given[node.attrs["name"]] = value
            out.append(given)
        return out

    def packed(self, entry: str, inputs: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        body = self.program.bodies[self.program.entries[entry].body]
        out = []
        for node in body.inputs:
            name, kinds = node.attrs["name"], [d.kind for d in node.type.dims]
            parts = [given[name] for given in inputs]
            out.append(torch.cat(parts, kinds.index("time")) if "time" in kinds else parts[0])
        return out

    def emitted(self, entry: str, step: Step, inputs: Sequence[dict[str, Tensor]]) -> Tensor:
        result: Tensor = getattr(self.model, entry)(step, *self.packed(entry, inputs))
        step.commit()
        return result

    def expected(
        self,
        entry: str,
        inputs: Sequence[dict[str, Tensor]],
        states: Sequence[CacheState] | None = None,
    ) -> list[Tensor]:
        """The interpreter's results, one per sequence."""
        held = states or [CacheState() for _ in inputs]
        return [
            self.interpreter.run(entry, given, state=state)
            for given, state in zip(inputs, held, strict=True)
        ]

    def check(
        self, entry: str, *chunks: Sequence[int], cached: bool = True, within: float = 1e-5
    ) -> None:
        """Each chunk is a step: how many tokens each sequence has in it. Results must agree."""
        states = [CacheState() for _ in chunks[0]]
        cache = Cache(len(chunks[0])) if cached else None
        for number, counts in enumerate(chunks):
            inputs = self.inputs(entry, counts, seed=number)
            with torch.no_grad():
                got = self.emitted(entry, Step(counts, cache=cache), inputs)
            wanted = [
                self.interpreter.run(entry, given, state=state)
                for given, state, count in zip(inputs, states, counts, strict=True)
                if count
            ]
            close(got, torch.cat(wanted, self.time_axis(entry)), within)

    def time_axis(self, entry: str) -> int:
        type = self.program.bodies[self.program.entries[entry].body].result.type
        kinds = [d.kind for d in type.dims]
        return next(i for i, kind in enumerate(kinds) if kind in ("time", "rows"))


def close(got: Tensor, wanted: Tensor, within: float = 1e-5) -> None:
    """Equal as the project means it: relative to the largest number."""
    assert got.shape == wanted.shape
    if got.dtype in (torch.int64, torch.bool):
        assert torch.equal(got, wanted)
        return
    assert torch.isfinite(got).all()
    if wanted.numel():
        error = (got.float() - wanted.float()).abs().max() / wanted.abs().max().clamp(min=1e-6)
        assert float(error) <= within
