"""RMSNorm, with and without a residual: the example of how a family is tested."""

import pytest
import torch
from running_kernels import compiles, load

from backends.triton.families.rms_norm import RMSNorm, generate
from backends.triton.targets import GFX942, SM_90, SM_100

EPS = 1e-6


def reference(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return wide * scale * gain.float()


@pytest.mark.parametrize("width", [1, 7, 128, 1000])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(width: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gain = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
    operator = generate(RMSNorm(width, EPS, str(dtype).removeprefix("torch.")), SM_90)
    with load(operator) as kernels:
        y = getattr(kernels, operator.name)(x, gain)
    assert y.dtype == dtype
    near = 1e-5 if dtype == torch.float32 else 2**-8  # half a step of bfloat16
    torch.testing.assert_close(y.float(), reference(x, gain), rtol=near, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_norm_of_a_sum(rows: int) -> None:
    torch.manual_seed(0)
    x, added = torch.randn(2, rows, 300).bfloat16()
    gain = torch.randn(300).bfloat16()
    operator = generate(RMSNorm(300, EPS, residual=True), SM_90)
    with load(operator) as kernels:
        y, total = getattr(kernels, operator.name)(x, added, gain)
    assert torch.equal(total, x + added)
    torch.testing.assert_close(y.float(), reference(total, gain), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("target", [SM_90, SM_100, GFX942], ids=lambda t: t.name)
def test_compiles(target) -> None:
    specs = [RMSNorm(7168, EPS), RMSNorm(7168, EPS, residual=True), RMSNorm(512, EPS)]
    binaries = compiles(*(generate(spec, target) for spec in specs), target=target)
    assert len(binaries) == 3


def test_traffic_is_each_operand_once() -> None:
    cost = generate(RMSNorm(7168, EPS), SM_90).traffic({"tokens": 4096})
    assert cost.bytes == cost.bound == (2 * 4096 + 1) * 7168 * 2
