"""Stand-alone quantisation: bit for bit what docs/deployments.md says."""

import pytest
import torch
from quantised import E4M3, E4M3_POWERS, FORMATS, quantise, same_bits
from running_kernels import compiles, load

from backends.pytorch.runtime.fp8 import quantize as rows_of_codes
from backends.triton.families.formats import quantised
from backends.triton.families.quantise import Quantise, generate
from backends.triton.targets import SM_90, SM_100
from compiler.coding import Coding
from dsl.deploy.typed import Stored
from dsl.formats import Tile
from dsl.program import open_program


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


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e4m3_ue8m0", "mxfp8"])
def test_declared_formats(name: str) -> None:
    """From its declaration to a kernel, and bit for bit the reference that the passes use."""
    format = open_program("dsv3").formats[name]
    tile = format.tile or Tile(1, 128)
    torch.manual_seed(0)
    x = torch.randn(9, 300) * torch.logspace(-40, 30, 9)[:, None]
    x[2, :128], x[3, 7], x[4, 200] = 0, float("nan"), float("inf")
    codes, scales = run(x, quantised(Stored(format, tile)))
    expected = rows_of_codes(x, Coding(format, tile.rows, tile.columns))
    assert same_bits(scales, expected.scales) and same_bits(codes, expected.codes)


@pytest.mark.parametrize(
    ("name", "tile", "why"),
    [
        ("mxfp4", None, "no GPU format has the codes of 'mxfp4'"),
        ("int8", Tile(1, 128), "no GPU format has the codes of 'int8'"),
        ("bf16", Tile(1, 128), "'bf16 1 x 128' has no scales"),
        ("e4m3", Tile(1, 96), "kernels have no tiles of 1 x 96"),
        ("e4m3", Tile(1, None), "kernels have no tiles of 1 x all"),
        ("e4m3", Tile(1, 16), "tiles of 1 x 16 are narrower than a product of tensor cores"),
    ],
)
def test_formats_without_kernels(name: str, tile, why: str) -> None:
    format = open_program("dsv3").formats[name]
    with pytest.raises(ValueError, match=why):
        quantised(Stored(format, tile or format.tile))


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
