"""The weights of an array of blocks as one tensor, as kernels over all of them read it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backends.pytorch.runtime.fp8 import CodedWeight


class StackedCodes:
    """The codes ``[blocks, n, k]`` and scales ``[blocks, .., ..]`` of quantised weights."""

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes, self.scale = codes, scale


def stacked(blocks: nn.ModuleList, name: str) -> Tensor | StackedCodes:
    """A parameter of every block, ``[blocks, ...]``, in one piece of memory.

    The first call moves the parameters there, which are views of it from then on, so that names,
    state dicts and memory stay what they were.
    """
    kept: dict[str, Tensor | StackedCodes] = blocks.__dict__.setdefault("_stacked", {})
    weights = [getattr(block, name).data for block in blocks]
    found = kept.get(name)
    if found is not None and _holds(found, weights):
        return found
    if isinstance(weights[0], CodedWeight):
        codes = torch.stack([weight.codes for weight in weights])
        scale = torch.stack([weight.scale for weight in weights])
        for number, weight in enumerate(getattr(block, name) for block in blocks):
            for one in (weight, weight.data):
                one.codes, one.scale = codes[number], scale[number]
        kept[name] = StackedCodes(codes, scale)
    else:
        whole = torch.stack(weights)
        for number, block in enumerate(blocks):
            getattr(block, name).data = whole[number]
        kept[name] = whole
    return kept[name]


def _holds(found: Tensor | StackedCodes, weights: list[Tensor]) -> bool:
    """Are these still the memory's, all of them?"""
    whole = found.codes if isinstance(found, StackedCodes) else found
    mine = [w.codes if isinstance(w, CodedWeight) else w for w in weights]
    if mine[0].dtype != whole.dtype or len(mine) != len(whole):
        return False
    step = whole.stride(0) * whole.element_size()
    first = whole.data_ptr()
    return all(w.data_ptr() == first + i * step for i, w in enumerate(mine))
