"""Routing in one kernel: scores, groups, the best experts, ties, weights."""

from dataclasses import replace

import pytest
import torch
from running_kernels import compiles, load

from backends.pytorch.runtime.ops import in_top, top
from backends.triton.families.router import RouterSpec, generate
from backends.triton.targets import GFX942, SM_90, SM_100

# As published for models of 671B, 236B, 47B (8 experts) and 30B (128 experts).
OF_671B = RouterSpec(
    256, 8, "sigmoid", True, 8, 4, 2, normalise=True, eps=1e-20, scale=2.5, dtype="float32"
)
OF_236B = RouterSpec(160, 6, "softmax", False, 8, 3, 1, 0.0, weigh_closed=True, scale=16.0)
OF_47B = RouterSpec(8, 2, "softmax", normalise=True)
OF_30B = RouterSpec(128, 8, "softmax", normalise=True, dtype="bfloat16")
PUBLISHED = [OF_671B, OF_236B, OF_47B, OF_30B]
ODD = [
    RouterSpec(1, 1),
    RouterSpec(7, 7, "softmax"),
    RouterSpec(12, 3, "sigmoid", True, 4, 2, 2, normalise=True),
    RouterSpec(15, 4, "softmax", True, 5, 2, 3, scale=0.5),
    RouterSpec(9, 5, "sigmoid", False, 3, 1, 1),  # more picks than the open group has experts
]


def reference(spec: RouterSpec, logits, bias):
    """The equations of std/moe.arch."""
    x = logits.float()
    score = torch.sigmoid(x) if spec.score == "sigmoid" else torch.softmax(x, -1)
    chooses = score + bias if spec.biased else score
    allowed = chooses
    if spec.open_groups < spec.groups:
        grouped = chooses.unflatten(-1, (spec.groups, -1))
        worth = top(grouped, spec.best)[0].sum(-1)
        closed = ~in_top(worth, spec.open_groups)[..., None]
        allowed = grouped.masked_fill(closed, spec.closed).flatten(-2)
    pick = top(allowed, spec.picks)[1]
    weight = (allowed if spec.weigh_closed else score).gather(-1, pick)
    if spec.normalise:
        weight = weight / (weight.sum(-1, keepdim=True) + spec.eps)
    return pick, weight * spec.scale


def check(spec: RouterSpec, logits, bias=None) -> None:
    if spec.biased and bias is None:
        bias = torch.randn(spec.experts) / 10
    operator = generate(spec, SM_90)
    with load(operator) as kernels:
        given = [logits, bias] if spec.biased else [logits]
        pick, weight = getattr(kernels, operator.name)(*given)
    want_pick, want_weight = reference(spec, logits, bias)
    assert pick.dtype == torch.int64 and torch.equal(pick, want_pick)
    torch.testing.assert_close(weight, want_weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spec", PUBLISHED + ODD, ids=lambda spec: spec.name)
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_routes(spec, tokens) -> None:
    torch.manual_seed(tokens)
    check(spec, torch.randn(tokens, spec.experts).to(getattr(torch, spec.dtype)))


@pytest.mark.parametrize("spec", PUBLISHED + ODD, ids=lambda spec: spec.name)
def test_ties_go_to_the_lowest_expert(spec) -> None:
    torch.manual_seed(0)
    logits = torch.randint(-1, 2, (9, spec.experts)).to(getattr(torch, spec.dtype))
    logits[0] = 0
    logits[1] = -0.0
    logits[2, ::2] = 0
    check(spec, logits, torch.zeros(spec.experts))


def test_the_bias_chooses_and_never_weighs() -> None:
    spec = RouterSpec(4, 2, biased=True, normalise=True)
    check(spec, torch.zeros(1, 4), torch.tensor([0.0, -1.0, 5.0, -1.0]))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("spec", [OF_671B, OF_47B], ids=lambda spec: spec.name)
def test_what_is_no_number_stays_in_its_row(spec, number) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, spec.experts)
    logits[1, 5] = number
    bias = torch.zeros(spec.experts)
    operator = generate(spec, SM_90)
    with load(operator) as kernels:
        given = [logits, bias] if spec.biased else [logits]
        pick, weight = getattr(kernels, operator.name)(*given)
    want_pick, want_weight = reference(spec, logits, bias)
    for row in (0, 2):
        assert torch.equal(pick[row], want_pick[row])
        torch.testing.assert_close(weight[row], want_weight[row], rtol=1e-5, atol=1e-7)
    assert ((pick >= 0) & (pick < spec.experts)).all() and len(set(pick[1].tolist())) == spec.picks
    if number != number and spec.score == "softmax":
        assert weight[1].isnan().all()


@pytest.mark.parametrize("tokens", [1, 5])
def test_each_tiling_gives_the_same(tokens) -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(tokens, 256), torch.randn(256) / 10
    operator = generate(OF_671B, SM_90)
    kernel = operator.kernels[0]
    for block in (1, 4, 16):
        config = replace(kernel.configs[0], constants={"BLOCK_T": block})
        tiled = replace(operator, kernels=(replace(kernel, configs=(config,)),))
        with load(tiled) as kernels:
            pick, _ = getattr(kernels, operator.name)(logits, bias)
        assert torch.equal(pick, reference(OF_671B, logits, bias)[0])


@pytest.mark.parametrize("target", [SM_90, SM_100, GFX942], ids=lambda t: t.name)
def test_compiles(target) -> None:
    assert compiles(*(generate(spec, target) for spec in PUBLISHED[:2]), target=target)


def test_traffic_is_each_operand_once() -> None:
    cost = generate(OF_671B, SM_90).traffic({"tokens": 4096})
    assert cost.bytes == cost.bound == 4096 * (256 * 4 + 8 * 12) + 1024


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(experts=10, picks=2, groups=4, open_groups=2), "10 experts in 4 groups, best 1"),
        (dict(experts=8, picks=9), "9 of 8 experts, 1 groups"),
        (dict(experts=8, picks=2, score="tanh"), "no score is called tanh"),
    ],
)
def test_what_cannot_be(wrong, said) -> None:
    with pytest.raises(ValueError, match=said):
        RouterSpec(**wrong)
