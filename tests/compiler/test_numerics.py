"""Quantising, for formats as declared: held to torch's own types, and to the definition by hand."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.coding import Coding
from compiler.numerics import nearest, quantised, represented
from dsl.program import open_program


@cache
def formats():
    return open_program("dsv3").formats


def coding(name, rows=1, columns=4):
    return Coding(formats()[name], rows, columns)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("bf16", torch.bfloat16)],
)
def test_rounding_is_that_of_torchs_type(name, dtype):
    format = formats()[name]
    x = torch.cat([torch.randn(5000) * 10.0**k for k in range(-10, 5)])
    ties = torch.arange(-4096, 4096) / 512  # halves between neighbours, subnormals among them
    x = torch.cat([x, ties, ties * 2**-7, torch.tensor([0.0, -0.0])])
    expected = x.clamp(-format.largest, format.largest).to(dtype).float()
    assert torch.equal(nearest(x, format), expected)


def test_what_is_too_large_is_the_largest_and_nan_stays():
    found = nearest(torch.tensor([1e9, -449.0, torch.inf, torch.nan]), formats()["e4m3"])
    assert found[:3].tolist() == [448, -448, 448] and found[3].isnan()


def test_integers_round_to_even_and_stay_within():
    found = nearest(torch.tensor([0.5, 1.5, -2.5, 127.6, -200.0]), formats()["int8"])
    assert found.tolist() == [0, 2, -2, 127, -127]


def test_a_tile_of_zeros_has_scale_one():
    codes, scales = quantised(torch.zeros(2, 5), coding("e4m3"))
    assert (scales == 1).all() and (codes == 0).all()


def test_a_scale_is_a_division_in_float32_and_codes_are_another():
    x = torch.randn(7, 13, generator=torch.Generator().manual_seed(0)) * 3
    codes, scales = quantised(x, coding("e4m3"))
    for row in range(7):
        for start in range(0, 13, 4):
            tile = x[row, start : start + 4]
            scale = tile.abs().max() / torch.tensor(448.0)
            assert (scales[row, start : start + 4] == scale).all()
            expected = (tile / scale).to(torch.float8_e4m3fn).float()
            assert torch.equal(codes[row, start : start + 4], expected)


def test_tiles_of_a_matrix_are_partial_at_its_edges():
    """The oracle that tests write FP8 checkpoints with."""
    from oracle.fp8 import quantise

    x = torch.randn(13, 10, generator=torch.Generator().manual_seed(1))
    stored, scales, meant = quantise(x, (4, 3))
    codes, spread = quantised(x, coding("e4m3", 4, 3))
    assert torch.equal(codes, stored.float())
    assert torch.equal(spread[::4, ::3], scales)
    assert torch.equal(represented(x, coding("e4m3", 4, 3)).float(), meant)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_tile_with_a_number_that_is_not_finite_is_nan_throughout(bad):
    x = torch.full((2, 8), 448.0)
    x[0, 5] = bad
    found = represented(x, coding("e4m3"))
    assert found[0, 4:].isnan().all() and (found[0, :4] == 448).all() and (found[1] == 448).all()


def test_scales_that_are_powers_of_two_are_the_next_one_up():
    """UE8M0: the least power of two that is no less than m / 448."""
    x = torch.tensor([[448.0, 0, 0, 0], [449.0, 0, 0, 0], [3.0, 0, 0, 0]])
    _, scales = quantised(x, coding("e4m3_ue8m0"))
    assert scales[:, 0].tolist() == [1, 2, 2**-7]
    x = torch.randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    codes, scales = quantised(x, coding("e4m3_ue8m0", 1, 64))
    assert (scales.log2() % 1 == 0).all() and codes.abs().max() <= 448
    assert (codes.abs().amax(1) > 448 / 2 / (1 + 2**-4)).all()  # no larger than needed


def test_exponents_are_those_of_the_mx_formats():
    x = torch.tensor([[448.0] + [0.0] * 31, [500.0] + [0.0] * 31, [3.0] + [0.0] * 31])
    codes, scales = quantised(x, coding("mxfp8", 1, 32))
    assert scales[:, 0].tolist() == [1, 1, 2**-7]
    assert codes[:, 0].tolist() == [448, 448, 384]


def test_scales_of_scales():
    """NVFP4: E4M3 scales of 16 elements, one float32 for the whole tensor."""
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    form = formats()["nvfp4"]
    _, scales = quantised(x, Coding(form, 1, 16))
    outer = x.abs().max() / 6 / 448
    inner = scales / outer
    assert torch.allclose(inner.to(torch.float8_e4m3fn).float(), inner, rtol=1e-6)
    assert (x - represented(x, Coding(form, 1, 16))).abs().max() < x.abs().max() / 6


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["e4m3", "e5m2", "e4m3_ue8m0", "int8", "mxfp8", "mxfp4", "int4"]),
    rows=st.integers(1, 6),
    columns=st.integers(1, 9),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    seed=st.integers(0, 999),
    size=st.integers(-30, 30),
)
def test_what_is_represented_is_represented_exactly_again(name, rows, columns, tile, seed, size):
    """And the error is at most half a step of the largest element of a tile."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    form = Coding(formats()[name], *tile)
    once = represented(x, form)
    step = 2.0**-form.format.fraction if not form.format.integer else 1 / form.format.largest
    room = 1.34 if form.format.rounding == "exponents" else 1.0  # it may cut off the largest
    assert ((x - once).abs() <= x.abs().max() * (step / 2 * 1.001 + (room - 1))).all()
    if form.format.rounding != "exponents" and form.format.scale.name == "f32":
        assert torch.allclose(represented(once.float(), form), once, rtol=1e-5, atol=0)


def test_a_format_is_not_known_by_name():
    renamed = replace(formats()["e4m3"], name="another")
    x = torch.randn(4, 8)
    assert torch.equal(represented(x, Coding(renamed, 1, 4)), represented(x, coding("e4m3")))
