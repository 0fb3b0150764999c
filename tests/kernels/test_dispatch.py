"""Tokens to their experts and back: stable order, no tokens for an expert, experts elsewhere."""

import pytest
import torch
from running_kernels import compiles, load

from backends.triton.families import combine, dispatch
from backends.triton.families.combine import CombineSpec
from backends.triton.families.dispatch import DispatchSpec
from backends.triton.targets import GFX942, SM_90, SM_100


def choices(tokens: int, picks: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Distinct experts for each token; the last expert gets none."""
    torch.manual_seed(seed)
    scores = torch.rand(tokens, experts)
    scores[:, experts - 1] = -1
    return scores.topk(picks).indices


def run(spec: DispatchSpec, *tensors):
    operator = dispatch.generate(spec, SM_90)
    with load(operator) as kernels:
        return getattr(kernels, operator.name)(*tensors)


def check(spec: DispatchSpec, pick: torch.Tensor, x: torch.Tensor, scales=None) -> None:
    rows, *more, row_of, where = run(spec, pick, x, *([scales] if spec.scales else []))
    local = pick.flatten() - spec.first
    here = (local >= 0) & (local < spec.experts)
    counts = torch.bincount(local[here], minlength=spec.experts)
    order = torch.where(here, local, spec.experts).argsort(stable=True)[: int(here.sum())]
    if spec.capacity is None:
        assert where.tolist() == [0, *counts.cumsum(0).tolist()]
        places = torch.arange(len(order))
    else:
        assert where.tolist() == counts.tolist()
        places = torch.cat([e * spec.capacity + torch.arange(int(n)) for e, n in enumerate(counts)])
    got = row_of.flatten()
    assert torch.equal(got[order].long(), places)
    assert (got[~here] == -1).all()
    assert torch.equal(rows.flatten(0, -2)[places], x[order // spec.picks])
    if spec.scales:
        assert torch.equal(more[0].flatten(0, -2)[places], scales[order // spec.picks])


@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize(("experts", "picks", "width"), [(8, 2, 32), (5, 3, 50), (2, 1, 1)])
def test_rows_by_expert(tokens, capacity, experts, picks, width) -> None:
    spec = DispatchSpec(experts, picks, width, "float32", capacity=capacity)
    check(spec, choices(tokens, picks, experts), torch.randn(tokens, width))


def test_more_choices_than_a_step_ranks() -> None:
    spec = DispatchSpec(3, 2, 4, "float32")
    check(spec, choices(1500, 2, 3), torch.randn(1500, 4))


@pytest.mark.parametrize("first", [0, 2, 4])
@pytest.mark.parametrize("capacity", [None, 16])
def test_experts_of_other_devices_are_left_out(first, capacity) -> None:
    spec = DispatchSpec(2, 3, 16, "float32", first=first, capacity=capacity)
    check(spec, choices(16, 3, 6), torch.randn(16, 16))


@pytest.mark.parametrize("capacity", [None, 9])
def test_quantised_rows_travel_with_their_scales(capacity) -> None:
    spec = DispatchSpec(4, 2, 256, "float8_e4m3fn", scales=2, capacity=capacity)
    x = torch.randn(9, 256).to(torch.float8_e4m3fn)
    # The interpreter has no 8-bit floats of torch: their bytes are moved.
    spec = DispatchSpec(4, 2, 256, "uint8", scales=2, capacity=capacity)
    check(spec, choices(9, 2, 4), x.view(torch.uint8), torch.rand(9, 2))


def test_int32_choices_and_one_expert_for_all() -> None:
    spec = DispatchSpec(4, 1, 8, "float32", index="int32")
    check(spec, torch.full((11, 1), 2, dtype=torch.int32), torch.randn(11, 8))


@pytest.mark.parametrize("added", [0, 1, 2])
@pytest.mark.parametrize(("picks", "width"), [(1, 1), (3, 50), (8, 700)])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_combine(added, picks, width, tokens) -> None:
    torch.manual_seed(0)
    rows = torch.randn(max(tokens * picks, 1), width)
    row_of = torch.randperm(tokens * picks).view(tokens, picks).int()
    if tokens > 1:
        row_of[1] = -1  # all of its experts are elsewhere
    weight = torch.rand(tokens, picks)
    more = [torch.randn(tokens, width) for _ in range(added)]
    operator = combine.generate(CombineSpec(picks, width, added, "float32"), SM_90)
    with load(operator) as kernels:
        y = getattr(kernels, operator.name)(rows, row_of, weight, *more)
    taken = rows[row_of.clamp(min=0)] * ((row_of >= 0) * weight)[..., None]
    torch.testing.assert_close(y, taken.sum(1) + sum(more))


def test_there_and_back() -> None:
    """With the experts left out, weights that sum to one give the tokens back."""
    pick, x = choices(20, 4, 9), torch.randn(20, 64).bfloat16()
    rows, row_of, _ = run(DispatchSpec(9, 4, 64), pick, x)
    operator = combine.generate(CombineSpec(4, 64), SM_90)
    with load(operator) as kernels:
        y = getattr(kernels, operator.name)(rows, row_of, torch.full((20, 4), 0.25))
    assert torch.equal(y, x)


@pytest.mark.parametrize("target", [SM_90, SM_100, GFX942], ids=lambda t: t.name)
def test_compiles(target) -> None:
    specs = [DispatchSpec(256, 8, 7168), DispatchSpec(32, 8, 7168, "uint8", 56, capacity=128)]
    operators = [dispatch.generate(spec, target) for spec in specs]
    operators.append(combine.generate(CombineSpec(8, 7168, 2), target))
    assert compiles(*operators, target=target)


@pytest.mark.parametrize("tokens", [1, 128, 4096])
def test_bytes_are_near_the_bound(tokens) -> None:
    for operator in (
        dispatch.generate(DispatchSpec(256, 8, 7168), SM_90),
        combine.generate(CombineSpec(8, 7168, 1), SM_90),
    ):
        cost = operator.traffic({"tokens": tokens})
        assert cost.bound <= cost.bytes <= 1.2 * cost.bound
