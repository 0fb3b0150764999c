"""What a family generates: the text of a kernel, how it is called, and what it costs.

A family is a module with ``generate(spec, target) -> Operator``. ``spec`` is a frozen dataclass of
shapes and dtypes, all of them numbers: the text is specialised to one model. Sizes that change from
call to call (tokens, positions, sequences) are arguments of the kernel; only tile sizes, which
tuning changes, are its ``constexpr`` parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Triton's names of dtypes, by torch's and this compiler's.
TRITON_DTYPES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "float8_e8m0fnu": "u8",
    "int64": "i64",
    "int32": "i32",
    "uint8": "u8",
    "bool": "i1",
}


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel that is not a ``constexpr``.

    Attributes:
        name: as in the function's signature.
        type: as Triton writes it: ``*bf16``, ``*fp8e4nv``, ``*fp32``, ``i32``, ``fp32``.
        aligned: of a pointer: it starts at a multiple of 16 bytes; of a whole number: it is a
            multiple of 16. Compiled-in, so a call that breaks it is compiled on the spot instead.
    """

    name: str
    type: str
    aligned: bool = False


def pointer(name: str, dtype: str) -> Argument:
    """A tensor that torch allocated: aligned to 16 bytes."""
    return Argument(name, f"*{TRITON_DTYPES[dtype]}", aligned=True)


def size(name: str, aligned: bool = False) -> Argument:
    """A whole number that changes from call to call."""
    return Argument(name, "i32", aligned)


@dataclass(frozen=True)
class Config:
    """One way to tile a kernel.

    Attributes:
        constants: values of the kernel's ``constexpr`` parameters.
        upto: used where the launcher's count (rows, tokens, ...) is at most this; None: for any.
    """

    constants: Mapping[str, int]
    num_warps: int
    num_stages: int = 1
    upto: int | None = None

    def text(self) -> str:
        """As keyword arguments of a launch."""
        given = dict(self.constants, num_warps=self.num_warps, num_stages=self.num_stages)
        return ", ".join(f"{name}={value}" for name, value in given.items())


@dataclass(frozen=True)
class Kernel:
    """One ``@triton.jit`` function.

    Attributes:
        name: of the function; unique in ``kernels.py``, shapes and dtypes in it.
        source: its whole text, decorator included. The docstring gives maths, tiling, bytes, FLOPs
            and the bound it should meet.
        arguments: those that are not ``constexpr``, in the order of the signature. The
            ``constexpr`` parameters come after them.
        configs: what is used, by ascending ``upto``; the last has none. All are compiled ahead.
        candidates: what else tuning may try.
        helpers: name and text of ``@triton.jit`` functions that it calls; kernels may share them.
    """

    name: str
    source: str
    arguments: tuple[Argument, ...]
    configs: tuple[Config, ...]
    candidates: tuple[Config, ...] = ()
    helpers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        bounds = [config.upto for config in self.configs]
        assert bounds and bounds[-1] is None and None not in bounds[:-1], self.name
        assert bounds[:-1] == sorted(b for b in bounds if b is not None), self.name


@dataclass(frozen=True)
class Traffic:
    """What one call moves and computes.

    Attributes:
        bytes: read from and written to memory with the tiling that is used.
        least: what any implementation has to move: each operand once, each result once.
        flops: of tensor cores, or of arithmetic where there is no product.
        meanwhile: of a product, what memory could move while tensor cores are at work.
    """

    bytes: float
    least: float
    flops: float
    meanwhile: float = 0.0

    @property
    def bound(self) -> float:
        """Bytes that take no longer than the call has to: those it must move, or, where tensor
        cores take longer than these, as many as memory can move in that time."""
        return max(self.least, self.meanwhile)


@dataclass(frozen=True)
class Operator:
    """A function of ``kernels.py`` that the model calls, and the kernels behind it.

    Attributes:
        name: of the function.
        kernels: in the order in which they are launched.
        launcher: the whole text of the function, docstring included: it allocates results and
            launches. It may use ``torch``, ``triton``, ``pick``, and each kernel ``NAME`` with its
            table of configurations ``NAME_configs``.
        traffic: the modelled cost of a call at sizes such as ``{"tokens": 4096}``.
        shown: the sizes at which the resource table shows the cost.
        dense: the launcher wants its tensors row after row, without gaps: others are copied first.
        example: arguments of the launcher at such sizes, random, on a device; what is timed. None:
            it is not timed.
    """

    name: str
    kernels: tuple[Kernel, ...]
    launcher: str
    traffic: Callable[[Mapping[str, int]], Traffic]
    shown: Mapping[str, int]
    dense: bool = True
    example: Callable[[Mapping[str, int], str], tuple[Any, ...]] | None = None
