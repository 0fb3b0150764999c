"""RMSNorm of rows, after a residual is added where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backends.triton.kernel import Config, Kernel, Operator, Traffic, pointer, size
from backends.triton.targets import Target

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = {"float32": "tl.float32", "bfloat16": "tl.bfloat16", "float16": "tl.float16"}


@dataclass(frozen=True)
class RMSNorm:
    """``y = x * rsqrt(mean(x^2) + eps) * gain``, rows ``[width]``.

    Attributes:
        dtype: of x, gain and y; sums are float32.
        residual: x is the sum of two tensors; the sum is returned too.
    """

    width: int
    eps: float
    dtype: str = "bfloat16"
    residual: bool = False


def generate(spec: RMSNorm, target: Target) -> Operator:
    """The operator ``name(x, gain) -> y``, or ``name(x, added, gain) -> (y, x + added)``."""
    name = f"rms_norm_{spec.width}" + ("_residual" if spec.residual else "")
    if spec.dtype != "bfloat16":
        name += f"_{spec.dtype}"
    block = 1 << (spec.width - 1).bit_length()
    return Operator(
        name=name,
        kernels=(_kernel(spec, f"{name}_kernel", block),),
        launcher=_launcher(spec, name),
        traffic=lambda sizes: _traffic(spec, sizes),
        shown={"tokens": 4096},
    )


def _kernel(spec: RMSNorm, name: str, block: int) -> Kernel:
    added = "added, " if spec.residual else ""
    total = "total, " if spec.residual else ""
    moved = (4 if spec.residual else 2) * spec.width * BYTES[spec.dtype]
    maths, load_added, store_total = "y = norm(x)", "", ""
    if spec.residual:
        maths = "y = norm(x + added), total = x + added"
        load_added = """
    value += tl.load(added + at, inside, other=0.0).to(tl.float32)
    value = value.to(x.dtype.element_ty).to(tl.float32)  # the sum is kept in x's dtype"""
        store_total = """
    tl.store(total + at, value.to(x.dtype.element_ty), inside)"""
    source = f'''
@triton.jit
def {name}(x, {added}gain, y, {total}rows, BLOCK: tl.constexpr):
    """{maths}; rows [{spec.width}].

    norm(v) = v * rsqrt(mean(v^2) + {spec.eps}) * gain.
    One program a row, BLOCK >= {spec.width} lanes, the row stays in registers. A row moves
    {moved:,} bytes and takes {4 * spec.width:,} FLOPs: the bound is memory, each operand once.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < {spec.width}
    at = row * {spec.width} + lane
    value = tl.load(x + at, inside, other=0.0).to(tl.float32){load_added}
    scale = tl.rsqrt(tl.sum(value * value) / {spec.width} + {spec.eps})
    weight = tl.load(gain + lane, inside, other=0.0).to(tl.float32)
    tl.store(y + at, (value * scale * weight).to(y.dtype.element_ty), inside){store_total}
'''
    tensors = ["x", "added", "gain", "y", "total"] if spec.residual else ["x", "gain", "y"]
    warps = max(1, min(8, block // 512))
    return Kernel(
        name=name,
        source=source,
        arguments=(*(pointer(tensor, spec.dtype) for tensor in tensors), size("rows")),
        configs=(Config({"BLOCK": block}, num_warps=warps),),
        candidates=tuple(Config({"BLOCK": block}, num_warps=n) for n in (2, 4, 8, 16)),
    )


def _launcher(spec: RMSNorm, name: str) -> str:
    if spec.residual:
        signature, allocated, passed = "x, added, gain", ", total", "x, added, gain, y, total"
        total = "\n    total = torch.empty_like(x)"
        about = f"RMSNorm of x + added [rows, {spec.width}], and the sum"
    else:
        signature, allocated, passed, total = "x, gain", "", "x, gain, y", ""
        about = f"RMSNorm of x [rows, {spec.width}]"
    return f'''
def {name}({signature}):
    """{about}; gain [{spec.width}]."""
    rows = x.shape[0]
    y = torch.empty_like(x){total}
    if rows:
        config = pick({name}_kernel_configs, rows)
        {name}_kernel[(rows, 1, 1)]({passed}, rows, **config)
    return y{allocated}
'''


def _traffic(spec: RMSNorm, sizes: Mapping[str, int]) -> Traffic:
    tensors = 4 if spec.residual else 2
    moved = (tensors * sizes["tokens"] + 1) * spec.width * BYTES[spec.dtype]
    return Traffic(bytes=moved, bound=moved, flops=4 * spec.width * sizes["tokens"])
