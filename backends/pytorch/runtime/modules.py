"""Making the modules of an emitted model: where their parameters live, and what they are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

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
        module.path = path  # type: ignore[assignment]
    return model
