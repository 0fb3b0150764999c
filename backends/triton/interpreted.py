"""Conversions of floats in Triton's interpreter, as GPUs do them.

The interpreter truncates float32 to bfloat16, and its rounding to 8 bits loses the carry. torch's
conversions round to nearest even; to 8 bits GPUs saturate (PTX ISA, ``cvt.rn.satfinite``). Its
products, and conversions to whole numbers and from them, take the bits of bfloat16 for whole
numbers.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

DTYPES = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
BITS = {1: (torch.uint8, np.uint8), 2: (torch.uint16, np.uint16), 4: (torch.uint32, np.uint32)}
BITS[8] = (torch.uint64, np.uint64)
KEPT = interpreter._convert_float


def convert(values: Any, have: Any, want: Any, rounding: Any) -> Any:
    """The bits of ``values`` in the dtype ``want``, as whole numbers of its width."""
    if have not in DTYPES or want not in DTYPES:
        return KEPT(values, have, want, rounding)
    torch_have, torch_want = DTYPES[have], DTYPES[want]
    numpy_bits = BITS[torch_have.itemsize][1]
    stored = torch.from_numpy(np.ascontiguousarray(values).view(numpy_bits).copy()).view(torch_have)
    if torch_want.itemsize == 1 and torch_have.itemsize > 1:
        most = torch.finfo(torch_want).max
        stored = stored.float().clamp(-most, most)
    converted = stored.to(torch_want).contiguous()
    return converted.view(BITS[torch_want.itemsize][0]).numpy().reshape(values.shape)


def install() -> None:
    """Mend the interpreter of this process; a second call does nothing."""
    if interpreter._convert_float is convert:
        return
    interpreter._convert_float = convert
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        have, want = source.dtype.scalar, wanted.scalar
        if have != want and have in DTYPES and want in DTYPES:
            bits = convert(source.data, have, want, None)
            data = bits.view(interpreter._get_np_dtype(wanted))
            return interpreter.TensorHandle(data, want)
        if want == tl.bfloat16 and have.is_int():
            return cast_impl(self, cast(self, source, tl.float32), wanted)
        if have == tl.bfloat16 and want.is_int():
            return cast(self, cast_impl(self, source, tl.float32), wanted)
        return cast(self, source, wanted)

    interpreter.InterpreterBuilder.cast_impl = cast_impl

    product = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def widened(x: Any) -> Any:
    """bfloat16 as float32, which holds its products exactly; anything else as it is."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    bits = convert(x.data, tl.bfloat16, tl.float32, None)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
