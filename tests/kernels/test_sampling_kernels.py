"""Choosing tokens on the GPU: as the sampler of the PyTorch path chooses."""

import math

import pytest
import torch
from running_kernels import compiles, load

from backends.triton.families.sampling import SamplingSpec, generate
from backends.triton.targets import GFX942, SM_90, SM_100

NEAR = 1e-5  # of the sums of probabilities: float32 in the kernel, float64 here


def greedy(logits: torch.Tensor) -> list[int]:
    dtype = str(logits.dtype).removeprefix("torch.")
    operator = generate(SamplingSpec(logits.shape[1], greedy=True, dtype=dtype), SM_90)
    with load(operator) as kernels:
        return getattr(kernels, operator.name)(logits).tolist()


def sample(logits, temperature, top_p, min_p, uniform) -> list[int]:
    operator = generate(SamplingSpec(logits.shape[1]), SM_90)
    rows = [
        torch.broadcast_to(torch.as_tensor(x, dtype=torch.float32), logits.shape[:1]).contiguous()
        for x in (temperature, top_p, min_p, uniform)
    ]
    with load(operator) as kernels:
        return getattr(kernels, operator.name)(logits, *rows).tolist()


def allowed(logits, temperature: float, top_p: float, min_p: float, uniform: float) -> set[int]:
    """What backends/pytorch/sampling.py chooses, with its sums moved by NEAR either way."""
    p = (logits.double() / temperature).softmax(-1)
    ordered, tokens = p.sort(stable=True, descending=True)
    before = ordered.cumsum(-1) - ordered
    found = set()
    for nudge in (-NEAR, 0.0, NEAR):
        kept = ordered.clone()
        if top_p < 1:
            kept[before >= top_p + nudge] = 0
            kept[0] = ordered[0]
        kept[kept < min_p * (1 + nudge) * kept[0]] = 0
        upto = kept.cumsum(-1)
        for moved in (-NEAR, 0.0, NEAR):
            at = torch.searchsorted(upto, uniform * upto[-1] + moved, right=True)
            found.add(int(tokens[min(int(at), int((kept > 0).sum()) - 1)]))
    return found


def check(logits, temperature=1.0, top_p=1.0, min_p=0.0, draws=(0.0, 0.2, 0.5, 0.9, 0.9999)):
    for logit in logits:
        got = sample(logit.repeat(len(draws), 1), temperature, top_p, min_p, list(draws))
        for token, uniform in zip(got, draws, strict=True):
            assert token in allowed(logit, temperature, top_p, min_p, uniform), (token, uniform)


@pytest.mark.parametrize("vocab", [1, 7, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_lowest_of_the_likeliest(vocab, dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, vocab).to(dtype)
    logits[1] = 0
    logits[2, vocab // 2 :] = 9
    assert greedy(logits) == [int(logits[0].argmax()), 0, vocab // 2]


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_greedy_on_what_is_no_number(number) -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, number, 0.0], [number, number, number]])
    last = {True: [-1, -1], False: [1, 0] if number > 0 else [0, 0]}[math.isnan(number)]
    assert greedy(logits) == [1, *last]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_temperature(temperature) -> None:
    torch.manual_seed(0)
    check(torch.randn(1, 300) * 3, temperature)


@pytest.mark.parametrize(
    ("top_p", "min_p"), [(0.9, 0.0), (0.3, 0.0), (1e-6, 0.0), (1.0, 0.1), (0.8, 0.2)]
)
def test_kept_tokens(top_p, min_p) -> None:
    torch.manual_seed(1)
    check(torch.randn(1, 200) * 2, 1.0, top_p, min_p)


@pytest.mark.parametrize("top_p", [1.0, 0.5, 0.21])
def test_ties_are_kept_and_drawn_from_the_lowest_on(top_p) -> None:
    check(torch.zeros(1, 10), 1.0, top_p, draws=(0.0, 0.05, 0.15, 0.45, 0.55, 0.95))
    check(torch.tensor([[0.0, 2.0, 2.0, -1.0, 2.0, 0.0]]), 1.0, top_p)


def test_each_sequence_has_its_own_parameters() -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 50) * 2
    temperature, top_p = [0.0, 1.0, 0.5, 2.0], [0.5, 1.0, 0.7, 0.9]
    got = sample(logits, temperature, top_p, 0.0, [0.4, 0.6, 0.1, 0.8])
    assert got[0] == int(logits[0].argmax())
    for row in (1, 2, 3):
        uniform = [0.4, 0.6, 0.1, 0.8][row]
        assert got[row] in allowed(logits[row], temperature[row], top_p[row], 0.0, uniform)


def test_a_draw_on_what_is_no_number_ends() -> None:
    rows = [[1.0, float("nan"), 0.0], [0.0, float("inf"), 1.0], [float("-inf")] * 3]
    got = sample(torch.tensor([*rows, [1.0, float("-inf"), 1.0]]), 1.0, 0.9, 0.0, 0.5)
    assert got[:2] == [-1, 1] and got[2] in range(3) and got[3] in (0, 2)


@pytest.mark.parametrize("target", [SM_90, SM_100, GFX942], ids=lambda t: t.name)
def test_compiles(target) -> None:
    operators = [generate(SamplingSpec(129280, greedy), target) for greedy in (True, False)]
    assert compiles(*operators, target=target)


def test_logits_are_read_from_memory_once() -> None:
    cost = generate(SamplingSpec(129280), SM_90).traffic({"sequences": 128})
    assert cost.bound <= cost.bytes <= 1.2 * cost.bound
