"""Stand-alone quantisation: bit for bit what docs/deployments.md says."""

import pytest
import torch
from quantised import E4M3, E4M3_POWERS, FORMATS, quantise, same_bits
from running_kernels import compiles, load

from backends.triton.families.quantise import Quantise, generate
from backends.triton.targets import SM_90, SM_100


def run(x, to):
    operator = generate(Quantise(x.shape[1], to, str(x.dtype).removeprefix("torch.")), SM_90)
    with load(operator) as kernels:
        return getattr(kernels, operator.name)(x)


@pytest.mark.parametrize("to", FORMATS, ids=lambda to: to.short)
def test_codes_and_scales_are_exact(to) -> None:
    torch.manual_seed(0)
    x = torch.randn(37, 300) * torch.logspace(-30, 30, 37)[:, None]
    x[3, :128] = 0
    x[4] = 1e-38  # scales near the least float32, and below
    x[5] = 1e-44
    x[6, 7], x[7, 200], x[8, 299] = float("nan"), float("inf"), -float("inf")
    x[9] = torch.arange(300) / 7
    codes, scales = run(x, to)
    expected, expected_scales = quantise(x, to)
    assert same_bits(scales, expected_scales)
    assert same_bits(codes, expected)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("width", [1, 64, 128, 129, 7168])
def test_shapes(rows: int, width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, width).bfloat16()
    codes, scales = run(x, E4M3)
    expected, expected_scales = quantise(x, E4M3)
    assert codes.shape == (rows, width) and scales.shape == (rows, -(-width // 128))
    assert same_bits(codes, expected) and same_bits(scales, expected_scales)


def test_scales_of_rows_lie_side_by_side() -> None:
    _, scales = run(torch.randn(5, 384), E4M3)
    assert scales.stride() == (1, 5)


@pytest.mark.parametrize("target", [SM_90, SM_100], ids=lambda t: t.name)
def test_compiles(target) -> None:
    specs = [Quantise(7168, E4M3), Quantise(2048, E4M3_POWERS), Quantise(300, E4M3, "float32")]
    compiles(*(generate(spec, target) for spec in specs), target=target)
