"""Making the modules of an emitted model, and what they compute once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def making(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Within, ``torch.empty`` makes tensors there and of that dtype, unless it says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def named(model: Model) -> Model:
    """Tell every module its ``path`` in the model (``layers.3.attn``), which caches go by."""
    for path, module in model.named_modules():
        module.path = path
    return model


class Numbered(nn.ModuleDict):
    """Modules with numbers that do not begin at 0: layer 3 is ``[3]``, and ``"3"`` in its path."""

    def __init__(self, modules: Iterable[tuple[int, nn.Module]]):
        super().__init__({str(number): module for number, module in modules})

    def __getitem__(self, number: int | str) -> nn.Module:
        return super().__getitem__(str(number))


def table(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A method whose result depends on no input: computed once per device and dtype of ``like``.

    Outside of inference mode and without gradients, so that it serves all later runs.
    """

    @wraps(method)
    def once(self: nn.Module, like: Tensor) -> Tensor:
        tables: dict[object, Tensor] = self.__dict__.setdefault("_tables", {})
        key = (method.__name__, like.device, like.dtype)
        if key not in tables:
            with torch.inference_mode(False), torch.no_grad():
                tables[key] = method(self, like)
        return tables[key]

    return once
