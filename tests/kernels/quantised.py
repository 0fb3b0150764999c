"""Quantising in PyTorch, from the definition in docs/deployments.md: the kernels' reference."""

import torch
from torch import Tensor

from backends.triton.families.formats import Quantised

E4M3 = Quantised("float8_e4m3fn", "float32", 1, 128)
E4M3_POWERS = Quantised("float8_e4m3fn", "float8_e8m0fnu", 1, 128, "up")
WEIGHTS = Quantised("float8_e4m3fn", "float32", 128, 128)
WEIGHTS_POWERS = Quantised("float8_e4m3fn", "float8_e8m0fnu", 128, 128, "up")
FORMATS = [
    E4M3,
    E4M3_POWERS,
    Quantised("float8_e4m3fn", "float8_e8m0fnu", 1, 32, "exponents"),
    Quantised("float8_e4m3fn", "float8_e8m0fnu", 1, 64, "nearest"),
    Quantised("float8_e4m3fn", "float32", 1, 128, "up", grid="float8_e8m0fnu"),
    Quantised("float8_e4m3fn", "bfloat16", 1, 128),
    Quantised("float8_e4m3fn", "float16", 1, 128),
    Quantised("float8_e5m2", "float32", 1, 128, largest=57344.0),
]


def scale_of(most: Tensor, to: Quantised) -> Tensor:
    """Scales from the largest magnitudes of tiles, as they are stored."""
    scale = most / to.largest
    if to.values == "float8_e8m0fnu":
        scale = power_of(scale, most, to)
    elif to.values != "float32":
        dtype = getattr(torch, to.values)
        scale = scale.clamp(max=torch.finfo(dtype).max).to(dtype).float()
    scale = torch.where((most == 0) | (scale == 0), torch.ones_like(scale), scale)
    scale = torch.where(most.isfinite(), scale, torch.full_like(scale, torch.nan))
    return scale.to(getattr(torch, to.scale))


def power_of(scale: Tensor, most: Tensor, to: Quantised) -> Tensor:
    """The power of two that a scale becomes; the least is 2^-127."""
    values = 2.0 ** torch.arange(-127, 128, dtype=torch.float64)
    wide = scale.double()[..., None]
    if to.rounding == "up":
        code = (values < wide).sum(-1)
    elif to.rounding == "exponents":
        least = torch.tensor(to.largest).double().log2().floor()
        code = (most.double().log2().floor() - least + 127).clamp(0, 254)
    else:
        code = ((values[1:] + values[:-1]) / 2 <= wide).sum(-1)
    return values[code.nan_to_num(0).long().clamp(max=254)].float()


def tiled(x: Tensor, rows: int, columns: int) -> Tensor:
    """[down, rows, across, columns]: the tiles of a matrix, zeros beyond its edges."""
    down, across = -(-x.shape[0] // rows), -(-x.shape[1] // columns)
    wide = torch.zeros(down * rows, across * columns, dtype=x.dtype)
    wide[: x.shape[0], : x.shape[1]] = x
    return wide.view(down, rows, across, columns)


def quantise(x: Tensor, to: Quantised) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix."""
    tiles = tiled(x.float(), to.rows, to.columns)
    scales = scale_of(tiles.abs().amax((1, 3)), to)
    codes = tiles / scales.float()[:, None, :, None]
    codes = codes.clamp(-to.largest, to.largest).to(getattr(torch, to.element))
    codes = codes.reshape(-1, codes.shape[2] * codes.shape[3])[: x.shape[0], : x.shape[1]]
    return codes.contiguous(), scales


def dequantise(codes: Tensor, scales: Tensor, to: Quantised) -> Tensor:
    """The values that codes and scales stand for, in float32."""
    wide = scales.float().repeat_interleave(to.rows, 0).repeat_interleave(to.columns, 1)
    return codes.float() * wide[: codes.shape[0], : codes.shape[1]]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit for bit the same, whatever kind of NaN."""
    nan = a.float().isnan()
    return torch.equal(nan, b.float().isnan()) and torch.equal(
        torch.where(nan, 0, a.float()), torch.where(nan, 0, b.float())
    )


def nearly_same(given: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Fused quantisation: scales within 4 ulp, at most 0.1% of codes one step off.

    A different order of summation moves scales by an ulp, and codes with them.
    """
    (codes, scales), (want, want_scales) = given, expected
    assert codes.shape == want.shape and scales.shape == want_scales.shape
    nan = want_scales.float().isnan()
    assert torch.equal(scales.float().isnan(), nan)
    if scales.dtype == torch.float32:
        steps = (scales.contiguous().view(torch.int32) - want_scales.view(torch.int32)).abs()
        assert steps[~nan].numel() == 0 or steps[~nan].max() <= 4
    else:
        assert same_bits(scales, want_scales)
    ours, theirs = (ordered(c) for c in (codes, want))
    assert torch.equal(codes.float().isnan(), want.float().isnan())
    off = (ours - theirs).abs()[~want.float().isnan()]
    assert off.numel() == 0 or (off.max() <= 1 and (off > 0).double().mean() <= 1e-3)


def ordered(codes: Tensor) -> Tensor:
    """Whole numbers in the order of the values: neighbours are one step apart."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)
