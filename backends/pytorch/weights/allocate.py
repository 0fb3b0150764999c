"""Memory for a model's weights, in the form in which they are run."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from math import ceil, prod

import torch
from torch import nn

from backends.pytorch.ahead.blocks import BlockedWeight
from backends.pytorch.ahead.decoder import Run
from backends.pytorch.ahead.plan import SCALE, Plan
from backends.pytorch.names import attribute_path
from backends.pytorch.runtime.fp8 import CodedWeight, code_type
from compiler.coding import Coding
from compiler.manifest import ManifestError
from compiler.tensors import Pattern, Tensor

WIDTH = {"f32": 4, "i64": 8, "bool": 1}


class Memory:
    """Gives the emitted module real parameters, one by one, in place of those without memory.

    Attributes:
        names: the checkpoint's, by the module's.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        plan: Plan | None = None,
        pieces: Mapping[str, Run] | None = None,
    ):
        """
        Args:
            plan: of a compiled decode step: says which arrays' weights lie behind one another, and
                which weights are kept as bytes and scales.
            pieces: its code; one of them widens such weights.
        """
        self.names: dict[str, str] = {}
        self._module = module
        self._device = device
        self._dtype = dtype
        self._plan = plan
        self._blocked = plan.blocked if plan else frozenset()
        self._block = plan.block if plan else None
        self._widen = pieces[plan.widen] if plan and plan.widen and pieces else None
        self._stacks: dict[str, torch.Tensor] = {}  # by path, with * for the number

    def needed(self, pattern: Pattern) -> int:
        """Bytes of all tensors of a pattern."""
        if pattern.coding is not None:
            codes, scales = coded_shapes(pattern.shape, pattern.coding)
            one = prod(codes) * code_type(pattern.coding.format).itemsize + 4 * prod(scales)
            return len(pattern) * one
        width = WIDTH.get(pattern.dtype, self._dtype.itemsize)
        first = next(iter(pattern.tensors()), None)
        if first is not None and self._place(attribute_path(first.path))[0] in self._blocked:
            width = 1
        return pattern.elements * width

    def of(self, tensor: Tensor) -> torch.Tensor:
        """Memory for a tensor; the module's from now on."""
        dtype = self._dtype if tensor.dtype == "act" else torch.float32
        path = attribute_path(tensor.path)
        coding = tensor.pattern.coding
        made = self._coded(tensor, coding) if coding else self._made(path, tensor.shape, dtype)
        self._put(path, made, tensor.pattern.role == "param")
        self.names[path] = tensor.name
        return made

    def weight(self, path: str) -> torch.Tensor:
        """What was made for an attribute path; with ``*`` for a number, all of the array's; with
        ``#scale`` behind it, the scales."""
        if path in self._stacks:
            return self._stacks[path]
        owner, name = self._owner(path.removesuffix(SCALE))
        found: torch.Tensor = getattr(owner, name).detach()
        if isinstance(found, BlockedWeight):
            return found.scale if path.endswith(SCALE) else found.data8
        return found

    def complete(self, patterns: Iterable[Pattern], needed: Container[Pattern]) -> None:
        """What has not been filled: zeros if an entry might read it, else left out, so that it
        takes no memory and is not in the state dict."""
        for pattern in patterns:
            for tensor in pattern.tensors():
                path = attribute_path(tensor.path)
                if pattern not in needed:
                    self._put(path, None, pattern.role == "param")
                elif path not in self.names:
                    zero(self.of(tensor))

    def _made(self, path: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        place, array, number = self._place(path)
        if place not in self._blocked:
            return self._allocated(place, array, number, shape, dtype)
        assert self._block and self._widen
        counts = [-(-size // along) for size, along in zip(shape, self._block, strict=True)]
        data = self._allocated(place, array, number, shape, torch.uint8)
        scale = self._allocated(place + SCALE, array, number, counts, torch.float32)
        run = self._widen
        return BlockedWeight(data, scale, dtype, lambda data, scale: run([data, scale])[0])

    def _coded(self, tensor: Tensor, coding: Coding) -> CodedWeight:
        codes, scales = coded_shapes(tensor.shape, coding)
        return CodedWeight(
            torch.empty(codes, dtype=code_type(coding.format), device=self._device),
            torch.empty(scales, dtype=torch.float32, device=self._device),
            coding,
            self._dtype if tensor.dtype == "act" else torch.float32,
        )

    def _place(self, path: str) -> tuple[str, str | None, str]:
        return self._plan.place(path) if self._plan else (path, None, "")

    def _allocated(
        self, place: str, array: str | None, number: str, shape: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        if array is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        numbers = [name for name, _ in self._module.get_submodule(array).named_children()]
        if place not in self._stacks:
            size = (len(numbers), *shape)
            self._stacks[place] = torch.empty(size, dtype=dtype, device=self._device)
        return self._stacks[place][numbers.index(number)]

    def _put(self, path: str, made: torch.Tensor | None, trained: bool) -> None:
        owner, name = self._owner(path)
        there = getattr(owner, name)
        if made is not None and there.shape != made.shape:
            raise ManifestError(
                f"model.py and the manifest disagree on {path}: {list(there.shape)} and "
                f"{list(made.shape)}"
            )
        if not trained or made is None:
            setattr(owner, name, made)
        else:
            wide = not isinstance(made, (BlockedWeight, CodedWeight))
            setattr(owner, name, nn.Parameter(made, requires_grad=wide))

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        owner, _, name = path.rpartition(".")
        return self._module.get_submodule(owner), name


def coded_shapes(shape: Sequence[int], coding: Coding) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Shapes of the codes and of the scales of a parameter: rows are its first axis."""
    rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], prod(shape[1:]))
    high, wide = coding.rows or max(rows, 1), coding.columns or max(columns, 1)
    if coding.format.scale is None:
        high, wide = max(rows, 1), max(columns, 1)
    return tuple(shape), (ceil(rows / high), ceil(columns / wide))


def zero(tensor: torch.Tensor) -> None:
    if isinstance(tensor, CodedWeight):
        tensor.codes.zero_()
        tensor.scale.fill_(1)
    else:
        tensor.zero_()
