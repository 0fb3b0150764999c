"""RMSNorm, with and without a residual, and in codes."""

import pytest
import torch
from quantised import E4M3, E4M3_POWERS, FORMATS, nearly_same, quantise
from running_kernels import compiles, load
from torch import Tensor

from backends.triton.families.rms_norm import RMSNorm, generate
from backends.triton.targets import GFX942, SM_90, SM_100

EPS = 1e-6


def reference(x: Tensor, gain: Tensor) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return wide * scale * gain.float()


def run(spec: RMSNorm, *given: Tensor):
    operator = generate(spec, SM_90)
    with load(operator) as kernels:
        return getattr(kernels, operator.name)(*given)


@pytest.mark.parametrize("width", [1, 7, 128, 1000])
@pytest.mark.parametrize("rows", [0, 1, 5, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(width: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gain = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
    y = run(RMSNorm(width, EPS, str(dtype).removeprefix("torch.")), x, gain)
    assert y.dtype == dtype
    near = 1e-5 if dtype == torch.float32 else 2**-8  # half a step of bfloat16
    torch.testing.assert_close(y.float(), reference(x, gain), rtol=near, atol=1e-6)


def test_heads_of_tokens_are_rows() -> None:
    """Norms of queries and keys have more dims than rows and columns."""
    torch.manual_seed(0)
    x, gain = torch.randn(5, 2, 3, 64), torch.randn(64)
    y = run(RMSNorm(64, EPS, "float32"), x, gain)
    torch.testing.assert_close(y, reference(x, gain), rtol=1e-5, atol=1e-6)


def test_rounding_before_the_gain() -> None:
    torch.manual_seed(0)
    x, gain = torch.randn(3, 300).bfloat16(), torch.randn(300).bfloat16()
    y = run(RMSNorm(300, EPS, rounds_before_gain=True), x, gain)
    unit = reference(x, torch.ones(300)).bfloat16()
    assert torch.equal(y, unit * gain)


@pytest.mark.parametrize("rows", [1, 3])
def test_norm_of_a_sum(rows: int) -> None:
    torch.manual_seed(0)
    x, added = torch.randn(2, rows, 300).bfloat16()
    gain = torch.randn(300).bfloat16()
    y, total = run(RMSNorm(300, EPS, residual=True), x, added, gain)
    assert torch.equal(total, x + added)
    torch.testing.assert_close(y.float(), reference(total, gain), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("to", FORMATS, ids=lambda to: to.short)
@pytest.mark.parametrize("width", [7, 300, 1536])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_norm_in_codes(to, width: int, rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, width)
    if rows > 3:
        x[1], x[2, 5], x[3, 2] = 0, float("nan"), float("inf")
    x, gain = x.bfloat16(), torch.randn(width).bfloat16()
    codes, scales = run(RMSNorm(width, EPS, to=to), x, gain)
    nearly_same((codes, scales), quantise(reference(x, gain), to))


def test_norm_of_a_sum_in_codes_and_kept() -> None:
    """What a router reads beside the experts: the norm in bfloat16, its codes, and the sum."""
    torch.manual_seed(0)
    x, added = torch.randn(2, 5, 300).bfloat16()
    gain = torch.randn(300).bfloat16()
    spec = RMSNorm(300, EPS, residual=True, to=E4M3, keep=True)
    y, codes, scales, total = run(spec, x, added, gain)
    assert torch.equal(total, x + added)
    torch.testing.assert_close(y.float(), reference(total, gain), rtol=2**-8, atol=1e-6)
    nearly_same((codes, scales), quantise(reference(total, gain), E4M3))


@pytest.mark.parametrize("target", [SM_90, SM_100, GFX942], ids=lambda t: t.name)
def test_compiles(target) -> None:
    specs = [RMSNorm(7168, EPS, residual=True), RMSNorm(512, EPS)]
    if target.fp8:
        specs += [
            RMSNorm(7168, EPS, residual=True, to=E4M3, keep=True),
            RMSNorm(1536, EPS, to=E4M3_POWERS),
        ]
    compiles(*(generate(spec, target) for spec in specs), target=target)


def test_traffic_is_each_operand_once() -> None:
    cost = generate(RMSNorm(7168, EPS), SM_90).traffic({"tokens": 4096})
    assert cost.bytes == cost.bound == (2 * 4096 + 1) * 7168 * 2
    cost = generate(RMSNorm(7168, EPS, to=E4M3), SM_90).traffic({"tokens": 1})
    assert cost.bytes == 7168 * 2 * 2 + 7168 + 56 * 4
