"""Which GPU kernels are generated and compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from compiler.errors import UserError


@dataclass(frozen=True)
class Target:
    """One kind of GPU.

    Attributes:
        name: as a user writes it, and the manifest states it: ``sm_90``, ``gfx942``.
        backend: what Triton calls the maker: ``cuda`` or ``hip``.
        arch: Triton's name of the architecture: compute capability times ten, or ``gfx942``.
        warp: threads in a warp (a wavefront on AMD).
        shared: bytes of shared memory that one program may use.
        sold: under which names it is sold.
        fp8: its tensor cores multiply E4M3 as it is stored by published checkpoints.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    sold: str
    fp8: bool

    @property
    def binary(self) -> str:
        """The ending of a compiled kernel's file."""
        return "cubin" if self.backend == "cuda" else "hsaco"


# Shared memory per program: CUDA C++ programming guide, table "technical specifications per
# compute capability" (227 KiB for 9.0 and 10.0, 163 KiB for 8.0, 99 KiB for 8.9); the LDS of CDNA3
# has 64 KiB. gfx942's 8-bit floats are the FNUZ kind, which published checkpoints do not use.
SM_80 = Target("sm_80", "cuda", 80, 32, 163 * 1024, "A100", fp8=False)
SM_89 = Target("sm_89", "cuda", 89, 32, 99 * 1024, "L40, RTX 4090", fp8=True)
SM_90 = Target("sm_90", "cuda", 90, 32, 227 * 1024, "H100, H200", fp8=True)
SM_100 = Target("sm_100", "cuda", 100, 32, 227 * 1024, "B200", fp8=True)
GFX942 = Target("gfx942", "hip", "gfx942", 64, 64 * 1024, "MI300", fp8=False)

FIRST_FP8 = 89  # compute capability from which NVIDIA's GPUs convert and multiply E4M3

TARGETS = {target.name: target for target in (SM_80, SM_89, SM_90, SM_100, GFX942)}


def multiplies_codes(name: str) -> bool:
    """Has a GPU of that name, one of ``TARGETS`` or not, E4M3 as published checkpoints store it?"""
    if name in TARGETS:
        return TARGETS[name].fp8
    return not name.startswith("sm_") or int(name.removeprefix("sm_")) >= FIRST_FP8


def target_named(name: str) -> Target:
    """The GPU of that name.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name not in TARGETS:
        raise UserError(f"no GPU is called '{name}' here; there is {', '.join(TARGETS)}")
    return TARGETS[name]
