"""Weights that stay in E4M3 with a scale for each block, as checkpoints store them.

``rows_of_blocks`` multiplies rows with them, without a copy in a wider type; ``widened`` makes such
a copy, of one matrix, where many rows are multiplied. In compiled pieces both are the functions in
``blocks.h``; here they are written in torch, which is what those are held to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

Widen = Callable[[Tensor, Tensor], Tensor]


@torch.library.custom_op("dslc::rows_of_blocks", mutates_args=())
def rows_of_blocks(
    x: Tensor, data: Tensor, scale: Tensor, pick: Tensor, rows: int, columns: int
) -> Tensor:
    """Row r of ``x`` times matrix ``pick[r]``, transposed.

    Args:
        x: [count, k].
        data: uint8 [matrices, n, k], the bytes of E4M3 numbers.
        scale: f32 [matrices, ceil(n / rows), ceil(k / columns)].
        pick: int64 [count].
        rows, columns: of a block.

    Returns:
        [count, n] in the dtype of ``x``, summed in f32.
    """
    wide = torch.stack([exact(data[i], scale[i], rows, columns) for i in pick.tolist()])
    return torch.einsum("rk,rnk->rn", x.float(), wide).to(x.dtype)


@rows_of_blocks.register_fake
def _(x: Tensor, data: Tensor, scale: Tensor, pick: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], data.shape[1])


@rows_of_blocks.register_vmap
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    pick: Tensor,
    rows: int,
    columns: int,
) -> tuple[Tensor, int]:
    assert in_dims[1] is None and in_dims[2] is None, "matrices are chosen by pick"
    size = info.batch_size
    x = x.expand(size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    pick = pick.expand(size, *pick.shape) if in_dims[3] is None else pick.movedim(in_dims[3], 0)
    x, pick = x.flatten(0, 1).contiguous(), pick.flatten().contiguous()
    flat = rows_of_blocks(x, data, scale, pick, rows, columns)
    return flat.unflatten(0, (size, -1)), 0


@torch.library.custom_op("dslc::widened", mutates_args=())
def widened(data: Tensor, scale: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix [n, k] in float32 or bfloat16, each number rounded once."""
    return exact(data, scale, rows, columns).to(dtype)


@widened.register_fake
def _(data: Tensor, scale: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty(data.shape, dtype=dtype)


def exact(data: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return data.view(torch.float8_e4m3fn).float() * spread[: data.shape[0], : data.shape[1]]


# What Inductor calls in the place of the two: declarations, and behind them their code.
SHIMS = {
    torch.ops.dslc.rows_of_blocks.default: [
        "AOTITorchError aoti_torch_cpu_rows_of_blocks(AtenTensorHandle, AtenTensorHandle, "
        "AtenTensorHandle, AtenTensorHandle, int64_t, int64_t, AtenTensorHandle*);\n"
        + Path(__file__).with_name("blocks.h").read_text()
    ],
    torch.ops.dslc.widened.default: [
        "AOTITorchError aoti_torch_cpu_widened(AtenTensorHandle, AtenTensorHandle, int64_t, "
        "int64_t, int32_t, AtenTensorHandle*)"
    ],
}


class NeedsWide(Exception):
    """A weight is used by more than products with rows; ``path`` says which."""

    def __init__(self, path: str):
        super().__init__(path)
        self.path = path


class Blocks:
    """Stands for a weight in a trace: a matrix that is only ever multiplied with rows.

    Args:
        data: uint8 [n, k], or [matrices, n, k] of which ``pick`` (int64, one number) says one.
        scale: f32, likewise.
    """

    def __init__(
        self,
        path: str,
        data: Tensor,
        scale: Tensor,
        block: tuple[int, int],
        pick: Tensor | None = None,
    ):
        self._path = path
        self._data = data
        self._scale = scale
        self._block = block
        self._pick = pick

    def picked(self, number: Tensor) -> Blocks:
        """One of several matrices."""
        return Blocks(self._path, self._data, self._scale, self._block, number)

    def rows(self, x: Tensor) -> Tensor:
        """``linear(x, self)``."""
        data, scale, pick = self._data, self._scale, self._pick
        if pick is None:
            data, scale, pick = data[None], scale[None], torch.zeros((), dtype=torch.int64)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        number = pick.expand(flat.shape[0]).contiguous()
        result = rows_of_blocks(flat, data, scale, number, *self._block)
        return result.unflatten(0, x.shape[:-1]) if x.ndim != 2 else result

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is linear and isinstance(args[1], Blocks) and not kwargs:
            product = args[1].rows(args[0])
            return product + args[2] if len(args) > 2 and args[2] is not None else product
        found = [a for a in args if isinstance(a, Blocks)]
        raise NeedsWide(found[0]._path if found else "")

    def __getattr__(self, name: str) -> Any:
        raise NeedsWide(self.__dict__["_path"])

    def _operator(self, *_: Any) -> Any:
        raise NeedsWide(self._path)

    __getitem__ = __neg__ = __add__ = __radd__ = __sub__ = __rsub__ = _operator
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = _operator


class BlockedWeight(Tensor):
    """A parameter that is kept as bytes and scales; what reads it gets a wide copy.

    Attributes:
        data8: uint8 [n, k].
        scale: f32 [ceil(n / rows), ceil(k / columns)].
    """

    data8: Tensor
    scale: Tensor
    _widen: Widen

    @staticmethod
    def __new__(
        cls, data8: Tensor, scale: Tensor, dtype: torch.dtype, widen: Widen
    ) -> BlockedWeight:
        made: BlockedWeight = Tensor._make_wrapper_subclass(
            cls, data8.shape, dtype=dtype, device=data8.device
        )
        made.data8, made.scale, made._widen = data8, scale, widen
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"BlockedWeight({list(self.shape)}, {self.dtype})"

    def wide(self) -> Tensor:
        """A copy in the dtype that it stands for. Views of the weight are views of such a copy."""
        return self._widen(self.data8, self.scale)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            (self,) = args
            return BlockedWeight(self.data8, self.scale, self.dtype, self._widen)
        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        if func._schema.is_mutable and any(isinstance(w, BlockedWeight) for w in flat):
            raise RuntimeError("a weight that is kept in FP8 cannot be written to")
        wide = torch.utils._pytree.tree_map_only(
            BlockedWeight, lambda w: w.wide(), (args, kwargs or {})
        )
        return func(*wide[0], **wide[1])
