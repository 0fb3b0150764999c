"""Elementwise chains: what they compute, and that they compile."""

import pytest
import torch
from running_kernels import compiles, load

from backends.triton.families.pointwise import Leaf, Pointwise, generate
from backends.triton.targets import GFX942, SM_90, SM_100


def chain(inner: int, *statements: str, leaves: int = 1, dtype: str = "float32") -> Pointwise:
    return Pointwise(
        name=f"chain_{inner}",
        dims=(("d", inner),),
        leaves=tuple(Leaf(f"x{i}", dtype, 4, inner) for i in range(leaves)),
        statements=tuple(statements),
        dtype=dtype,
        width=4,
        rows="x0.shape[0]",
        shape=f"(rows, {inner})",
        about="Under test.",
        flops=1,
    )


@pytest.mark.parametrize("inner", [1, 5, 1000, 2049])
@pytest.mark.parametrize("rows", [0, 1, 3, 130])
def test_every_element_is_computed_once(inner: int, rows: int) -> None:
    at = f"row * {inner} + d"
    spec = chain(
        inner,
        f"a = tl.load(x0 + {at}, inside, other=0)",
        f"b = tl.load(x1 + {at}, inside, other=0)",
        "result = a * b + d",
        leaves=2,
    )
    x, y = torch.randn(2, rows, inner)
    with load(generate(spec, SM_90)) as kernels:
        got = getattr(kernels, spec.name)(x, y)
    torch.testing.assert_close(got, x * y + torch.arange(inner))


@pytest.mark.parametrize(("quarters", "exact"), [(0, torch.sin), (1, torch.cos)])
def test_sine_of_positions(quarters: int, exact) -> None:
    """Rotary angles reach a position's number; float32's own steps there are not counted."""
    spec = chain(
        64,
        "a = tl.load(x0 + row * 64 + d, inside, other=0)",
        f"result = sine(a, {quarters})",
    )
    x = torch.cat([torch.linspace(-7, 7, 640), torch.linspace(0, 163840, 640)]).view(-1, 64)
    with load(generate(spec, SM_90)) as kernels:
        got = getattr(kernels, spec.name)(x)
    assert (got.double() - exact(x.double())).abs().max() < 2e-7


@pytest.mark.parametrize("target", [SM_90, SM_100, GFX942], ids=lambda t: t.name)
def test_sine_takes_no_stack(target) -> None:
    read = "a = tl.load(x0 + row * 64 + d, inside, other=0)"
    compiles(generate(chain(64, read, "result = sine(a, 1)"), target), target=target)
