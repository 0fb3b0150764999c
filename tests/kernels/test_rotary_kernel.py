"""Rotary embedding, over neighbouring pairs and over halves."""

import pytest
import torch
from running_kernels import compiles, load

from backends.triton.families.rotary import RotarySpec, generate
from backends.triton.targets import GFX942, SM_90, SM_100


def reference(x, cosine, sine, halves: bool):
    a, b = x.float().chunk(2, -1) if halves else x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosine[:, None], sine[:, None]
    turned = a * cosine - b * sine, b * cosine + a * sine
    return torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 6), (4, 64), (5, 80)])
@pytest.mark.parametrize("tokens", [0, 1, 19])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_turns_pairs(halves, heads, dim, tokens, dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, heads, dim).to(getattr(torch, dtype))
    angle = torch.randn(tokens, dim // 2)
    operator = generate(RotarySpec(heads, dim, halves, dtype=dtype), SM_90)
    with load(operator) as kernels:
        y = getattr(kernels, operator.name)(x, angle.cos(), angle.sin())
    assert y.dtype == x.dtype and y.is_contiguous()
    near = 1e-5 if dtype == "float32" else 2**-8
    want = reference(x, angle.cos(), angle.sin(), halves)
    torch.testing.assert_close(y.float(), want, rtol=near, atol=1e-5)


def test_a_part_of_each_head() -> None:
    """Of heads of 12 numbers, the last 4 are turned where they lie."""
    q = torch.randn(7, 3, 12)
    angle = torch.randn(7, 2)
    operator = generate(RotarySpec(3, 4, False, 36, 12, dtype="float32"), SM_90)
    with load(operator) as kernels:
        y = getattr(kernels, operator.name)(q[..., 8:], angle.cos(), angle.sin())
    torch.testing.assert_close(y, reference(q[..., 8:], angle.cos(), angle.sin(), False))


def test_heads_within_rows() -> None:
    """The same of the rows that the heads are a part of."""
    q = torch.randn(7, 3, 12)
    angle = torch.randn(7, 2)
    operator = generate(RotarySpec(3, 4, True, 36, 12, dtype="float32", offset=8), SM_90)
    with load(operator) as kernels:
        y = getattr(kernels, operator.name)(q.flatten(1), angle.cos(), angle.sin())
    torch.testing.assert_close(y, reference(q[..., 8:], angle.cos(), angle.sin(), True))


@pytest.mark.parametrize("target", [SM_90, SM_100, GFX942], ids=lambda t: t.name)
def test_compiles(target) -> None:
    specs = [RotarySpec(128, 64, False, 128 * 192, 192), RotarySpec(32, 128, True)]
    assert compiles(*(generate(spec, target) for spec in specs), target=target)


def test_traffic_is_each_operand_once() -> None:
    cost = generate(RotarySpec(128, 64), SM_90).traffic({"tokens": 10})
    assert cost.bytes == cost.bound == 10 * (2 * 128 * 64 * 2 + 2 * 32 * 4)


def test_an_odd_head_has_no_pairs() -> None:
    with pytest.raises(ValueError, match="7 numbers do not make pairs"):
        RotarySpec(1, 7)
