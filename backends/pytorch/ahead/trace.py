"""Tracing a method of an emitted model for one token, with its caches and weights as arguments."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from backends.pytorch.ahead.blocks import Blocks
from backends.pytorch.ahead.onetoken import OneToken, stacks, with_weights
from backends.pytorch.ahead.plan import SCALE
from backends.pytorch.ahead.products import OneRow

EXAMPLE_HISTORY = 71  # any length above 1: what is traced holds for all of them
MOST_HISTORY = 1 << 31

Method = Callable[..., Tensor]  # (step, *values) -> value


class Traced:
    """A method on (step, *values), and what else it reads.

    Attributes:
        owner: the module whose weights it may read.
        caches: by path, in the order of extension, an example [history, ...].
        weights: by attribute path within the owner, an example; an array that is read by index has
            one path for all its blocks, with ``*`` for the number.
    """

    def __init__(
        self,
        method: Method,
        values: Sequence[Tensor],
        index: Tensor,
        owner: nn.Module,
        without: Container[nn.Module] = (),
        blocked: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    ):
        """
        Args:
            blocked: attribute paths in the model of weights that are bytes with a scale for each
                block, and the rows and columns of a block.
            values: examples of what the method is given beside the step.
            index: an example of the token's place, int64 [1].
            without: modules within the owner whose weights it does not read.
        """
        self.method = method
        self.values = list(values)
        self.index = index
        self.owner = owner
        self.caches: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self._blocked = blocked
        self._block = next(iter(blocked.values()), (1, 1))
        self._arrays: dict[nn.Module, str] = {}  # read by index: how their weights' paths begin
        self._collect(owner, without)
        self._run(self.values, self.index, self._noted, self.weights, EXAMPLE_HISTORY)

    def _collect(self, module: nn.Module, without: Container[nn.Module], path: str = "") -> None:
        held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in held:
            self._add(path + name, self._absolute(path + name), tensor)
        for name, child in module.named_children():
            if child not in without:
                self._collect(child, without, f"{path}{name}.")

    def _absolute(self, path: str) -> str:
        """An attribute path in the model, of one in the owner."""
        return f"{self.owner.path}.{path}" if self.owner.path else path

    def _add(self, name: str, path: str, tensor: Tensor, count: int | None = None) -> None:
        """An example of a weight, or of the stack of ``count`` of them."""
        lead = () if count is None else (count,)
        if path not in self._blocked:
            self.weights[name] = tensor.new_empty(*lead, *tensor.shape)
            return
        sizes = zip(tensor.shape, self._blocked[path], strict=True)
        scales = [-(-size // along) for size, along in sizes]
        self.weights[name] = torch.empty(*lead, *tensor.shape, dtype=torch.uint8)
        self.weights[name + SCALE] = torch.empty(*lead, *scales)

    def _given(self, start: str, weights: dict[str, Tensor]) -> dict[str, Tensor | Blocks]:
        """Weights whose names begin like this, by the rest of them; blocked ones as such."""
        found: dict[str, Tensor | Blocks] = {}
        for name, tensor in weights.items():
            if not name.startswith(start) or name.endswith(SCALE):
                continue
            scale = weights.get(name + SCALE)
            path = self._absolute(name)
            given = tensor if scale is None else Blocks(path, tensor, scale, self._block)
            found[name.removeprefix(start)] = given
        return found

    def _stacked(self, blocks: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor | Blocks]:
        """What ``onetoken.apply`` reads: an array's weights, by their names within a block."""
        if blocks not in self._arrays:  # only in the first run
            path = next(name for name, module in self.owner.named_modules() if module is blocks)
            for name in [n for n in weights if n.startswith(f"{path}.")]:
                del weights[name]
            count, first = len(list(blocks.children())), next(iter(blocks.children()))
            for name, tensor in [*first.named_parameters(), *first.named_buffers()]:
                self._add(f"{path}.*.{name}", f"{first.path}.{name}", tensor, count)
            self._arrays[blocks] = f"{path}.*."
        return self._given(self._arrays[blocks], weights)

    def _noted(self, path: str, x: Tensor) -> Tensor:
        self.caches[path] = x.new_empty(EXAMPLE_HISTORY, *x.shape[1:])
        return self.caches[path]

    def _run(
        self,
        values: Sequence[Tensor],
        index: Tensor,
        extend: Callable[[str, Tensor], Tensor],
        weights: dict[str, Tensor],
        history: Any,
    ) -> Tensor:
        plain = {n: w for n, w in self._given("", weights).items() if "*" not in n}
        step = OneToken(index, extend, history)
        with torch.no_grad(), stacks(lambda blocks: self._stacked(blocks, weights)), OneRow():
            return with_weights(self.owner, self.method, plain, (step, *values))

    def export(self) -> ExportedProgram:
        """The trace, a program on lists of values (the place behind them), caches and weights.

        The caches are written to. The length of the history is a symbol, 2 or more.
        """
        traced = self

        class Program(nn.Module):
            def forward(
                self, values: list[Tensor], caches: list[Tensor], weights: list[Tensor]
            ) -> Tensor:
                *given, index = values
                by_path = dict(zip(traced.caches, caches, strict=True))
                by_name = dict(zip(traced.weights, weights, strict=True))

                def extend(path: str, x: Tensor) -> Tensor:
                    cache = by_path[path]
                    return cache.index_put_((index,), x.to(cache.dtype))

                history = caches[0].shape[0] if caches else None
                return traced._run(given, index, extend, by_name, history)

        values, caches, weights = self.examples()
        shapes = ([None] * len(values), [HISTORY] * len(caches), [None] * len(weights))
        with torch.no_grad():
            return torch.export.export(
                Program(), (values, caches, weights), dynamic_shapes=shapes, strict=False
            )

    def examples(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Values and the place, caches, weights: what a call of the program is given."""
        return [*self.values, self.index], [*self.caches.values()], [*self.weights.values()]


HISTORY = {0: Dim("history", min=2, max=MOST_HISTORY)}


def fresh(x: Tensor) -> Tensor:
    """A tensor of the current mode like one of another trace.

    Raises:
        NotImplementedError: its shape depends on the history's length.
    """
    if not all(isinstance(n, int) for n in x.shape):
        raise NotImplementedError("a value along the history goes from layer to layer")
    return torch.empty(x.shape, dtype=x.dtype)
