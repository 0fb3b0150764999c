"""Products of a few rows with weights in bfloat16, or in E4M3 with a scale for each block.

What the tokens of a prompt make of an expert is a product of some dozens of rows, and so is every
product of a short prompt, of a batch that decodes, or of tokens that are verified. The code is in
``rows.h``; ``FewRows`` puts it where the emitted module says ``F.linear``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from backends.pytorch.ahead.blocks import BlockedWeight, exact

MOST_ROWS = 256  # of more, torch's products are as fast
MOST_NUMBERS = 1 << 18  # of rows: they stay in a core's cache
LEAST_WEIGHTS = 1 << 14  # smaller ones are in a cache as well
NEEDS = ("avx512_bf16", "avx512bw", "avx512vl")  # features of the CPU

Run = Callable[[list[Tensor]], list[Tensor]]


@torch.library.custom_op("dslc::few_rows", mutates_args=())
def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """``linear(x, weight)``.

    Args:
        x: bfloat16 [m, k], contiguous, k even.
        weight: bfloat16 [n, k], whose rows are contiguous.
    """
    return linear(x, weight)


@few_rows.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("dslc::few_rows_of_blocks", mutates_args=())
def few_rows_of_blocks(x: Tensor, data: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """``linear(x, weight)`` with what ``blocks.widened`` makes of the last four.

    Args:
        x: bfloat16 [m, k], contiguous, k even.
    """
    return linear(x, exact(data, scale, rows, columns).to(x.dtype))


@few_rows_of_blocks.register_fake
def _(x: Tensor, data: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], data.shape[0])


# As of blocks.SHIMS, behind whose code this stands.
SHIMS = {
    torch.ops.dslc.few_rows.default: [
        "AOTITorchError aoti_torch_cpu_few_rows(AtenTensorHandle, AtenTensorHandle, "
        "AtenTensorHandle*);\n" + Path(__file__).with_name("rows.h").read_text()
    ],
    torch.ops.dslc.few_rows_of_blocks.default: [
        "AOTITorchError aoti_torch_cpu_few_rows_of_blocks(AtenTensorHandle, AtenTensorHandle, "
        "AtenTensorHandle, int64_t, int64_t, AtenTensorHandle*)"
    ],
}


class FewRows(TorchFunctionMode):
    """Within it, ``F.linear`` of few rows is the compiled code; all else is what it was.

    Args:
        wide: runs ``few_rows``.
        blocked: runs ``few_rows_of_blocks``; None where no weight is kept as bytes.
    """

    def __init__(self, wide: Run, blocked: Run | None = None):
        super().__init__()
        self._wide = wide
        self._blocked = blocked

    def __deepcopy__(self, memo: object) -> FewRows:
        """Code has no weights: a copy of a model may use it as well."""
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is linear and len(args) == 2 and not kwargs and _fits(*args):
            x, weight = args
            rows = x.reshape(-1, x.shape[-1])
            if not isinstance(weight, BlockedWeight):
                result = self._wide([rows, weight.detach()])[0]
            elif self._blocked:
                result = self._blocked([rows, weight.data8, weight.scale])[0]
            else:
                return func(*args)
            return result if x.ndim == 2 else result.unflatten(0, x.shape[:-1])
        return func(*args, **(kwargs or {}))


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Are these few enough rows, and laid out as the code reads them?"""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and weight.ndim == 2
        and weight.shape[1] % 2 == 0
        and 1 < x.numel() // max(weight.shape[1], 1) <= MOST_ROWS
        and x.numel() <= MOST_NUMBERS
        and weight.numel() >= LEAST_WEIGHTS
        and x.is_contiguous()
        and (isinstance(weight, BlockedWeight) or weight.stride(1) == 1)
        and x.device.type == weight.device.type == "cpu"
    )
