"""Gated units, in bfloat16 and in codes, of all rows or of those that are tokens."""

import pytest
import torch
from quantised import E4M3, E4M3_POWERS, FORMATS, nearly_same, quantise
from running_kernels import compiles, load
from torch import Tensor

from backends.triton.families.gated import Gated, generate
from backends.triton.targets import GFX942, SM_90, SM_100


def reference(gate: Tensor, up: Tensor) -> Tensor:
    return gate.float() * torch.sigmoid(gate.float()) * up.float()


def run(spec: Gated, *given: Tensor):
    operator = generate(spec, SM_90)
    with load(operator) as kernels:
        return getattr(kernels, operator.name)(*given)


@pytest.mark.parametrize("width", [1, 128, 300, 1024])
@pytest.mark.parametrize("rows", [0, 1, 19])
def test_gated(width: int, rows: int) -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(2, rows, width).bfloat16()
    y = run(Gated(width), gate, up)
    torch.testing.assert_close(y.float(), reference(gate, up), rtol=2**-8, atol=1e-6)
    both = torch.cat([gate, up], 1)
    assert torch.equal(run(Gated(width, stacked=True), both), y)


@pytest.mark.parametrize("to", FORMATS, ids=lambda to: to.short)
def test_gated_in_codes(to) -> None:
    torch.manual_seed(0)
    gate, up = 3 * torch.randn(2, 37, 300)
    up[3, :128], gate[4, 3], up[5, 299] = 0, float("nan"), float("inf")
    gate, up = gate.bfloat16(), up.bfloat16()
    nearly_same(run(Gated(300, to=to), gate, up), quantise(reference(gate, up), to))
    both = torch.cat([gate, up], 1)
    nearly_same(run(Gated(300, stacked=True, to=to), both), quantise(reference(gate, up), to))


def test_only_tokens() -> None:
    torch.manual_seed(0)
    both = torch.randn(3, 6, 400).bfloat16()
    counts = torch.tensor([0, 6, 2]).int()
    spec = Gated(200, stacked=True, to=E4M3, capacity=6)
    codes, scales = run(spec, both, counts)
    assert codes.shape == (3, 6, 200) and scales.shape == (3, 6, 2)
    for expert, count in enumerate(counts):
        gate, up = both[expert, :count].split(200, 1)
        given = codes[expert, :count], scales[expert, :count]
        nearly_same(given, quantise(reference(gate, up), E4M3))


def test_an_activation_of_ones_own() -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(2, 5, 200).bfloat16()
    squared = Gated(200, activation="tl.maximum(gate, 0.0) * gate", name="relu_squared")
    expected = gate.float().relu() * gate.float() * up.float()
    torch.testing.assert_close(run(squared, gate, up).float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("target", [SM_90, SM_100, GFX942], ids=lambda t: t.name)
def test_compiles(target) -> None:
    specs = [Gated(18432), Gated(300, "float32")]
    if target.fp8:
        specs += [Gated(18432, to=E4M3), Gated(2048, stacked=True, to=E4M3_POWERS, capacity=64)]
    compiles(*(generate(spec, target) for spec in specs), target=target)


def test_traffic_is_each_operand_once() -> None:
    cost = generate(Gated(2048, to=E4M3), SM_90).traffic({"tokens": 3})
    assert cost.bytes == cost.bound == 3 * (2 * 2048 * 2 + 2048 + 16 * 4)
