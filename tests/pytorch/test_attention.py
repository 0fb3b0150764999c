"""Attention: against a plain one per sequence, ragged and in stretches, with its gradients."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.pytorch.runtime import Cache, Step, attention
from backends.pytorch.runtime.attention import Visible

MODULE = sys.modules["backends.pytorch.runtime.attention"]
H, T, N, J, V = 3, 2, 4, 5, 6  # T heads share one key


def naive(
    step: Step,
    q: Tensor,
    k: Tensor,
    value: Tensor,
    scale: float,
    sees: Callable[[int, int], bool],
    score: Callable[[Tensor], Tensor] = lambda score: score,
    sink: Tensor | None = None,
) -> Tensor:
    """``[total, heads, v]`` from queries ``[total, heads, n]``, keys and values with heads."""
    out = []
    for row in range(step.total):
        b, at = int(step.sequence[row]), int(step.position[row])
        seen = [i for i in range(step.lengths[b]) if sees(at, int(step.history_position[b, i]))]
        if not seen:
            out.append(torch.zeros(q.shape[1], value.shape[-1]))
            continue
        scores = torch.einsum("hn,shn->hs", q[row].float(), k[b, seen].float()) * scale
        scores = score(scores)
        if sink is not None:
            scores = torch.cat([scores, sink[:, None].float()], -1)
        p = scores.softmax(-1)[:, : len(seen)]
        out.append(torch.einsum("hs,shv->hv", p, value[b, seen].float()))
    return torch.stack(out)


class Case:
    """Random queries, keys and values of some sequences; keys shared by all heads or by some."""

    def __init__(self, counts: list[int], starts: list[int], **options: Tensor):
        cache = Cache(len(counts))
        cache.lengths = list(starts)
        self.step = Step(counts, cache=cache if any(starts) else None, **options)
        torch.manual_seed(0)
        b, s, total = self.step.batch, self.step.history, self.step.total
        self.q, self.q_r = torch.randn(total, H, T, N), torch.randn(total, H, T, J)
        self.k, self.k_r, self.v = (
            torch.randn(b, s, H, N),
            torch.randn(b, s, J),
            torch.randn(b, s, H, V),
        )

    def expected(self, sees: Callable[[int, int], bool], **more: Any) -> Tensor:
        b, s = self.step.batch, self.step.history
        q = torch.cat([self.q, self.q_r], -1).flatten(1, 2)
        k = self.k[:, :, :, None].expand(-1, -1, -1, T, -1)
        k_r = self.k_r[:, :, None, None].expand(-1, -1, H, T, -1)
        v = self.v[:, :, :, None].expand(-1, -1, -1, T, -1)
        keys = torch.cat([k, k_r], -1).reshape(b, s, H * T, N + J)
        out = naive(self.step, q, keys, v.reshape(b, s, H * T, V), 0.3, sees, **more)
        return out.unflatten(1, (H, T))

    def got(self, visible: Visible | None, mask: Tensor | None = None, **more: Any) -> Tensor:
        return attention(
            self.step,
            [("thgn,shn->hgts", self.q, self.k), ("thgj,sj->hgts", self.q_r, self.k_r)],
            ("hgts,shv->thgv", self.v),
            scale=0.3,
            visible=visible,
            mask=mask,
            **more,
        )


STEPS = [
    ([4], [0]),
    ([3, 1, 5], [0, 0, 0]),
    ([1, 1], [3, 3]),
    ([1, 1], [3, 6]),
    ([2, 4, 1], [7, 0, 2]),
]


@pytest.mark.parametrize(("counts", "starts"), STEPS)
@pytest.mark.parametrize("visible", [None, (0, None), (0, 3), (1, None), (1, 3), (-1, 2)])
@pytest.mark.parametrize("most", [1 << 24, 150, 1])
def test_visible_by_distance(
    counts: list[int],
    starts: list[int],
    visible: Visible | None,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MODULE, "MOST_SCORES", most)
    case = Case(counts, starts)
    least, beyond = visible or (-math.inf, None)
    wanted = case.expected(lambda at, other: least <= at - other < (beyond or math.inf))
    torch.testing.assert_close(case.got(visible), wanted, rtol=1e-5, atol=1e-6)


def capped(score: Tensor) -> Tensor:
    return 0.4 * torch.tanh(score / 0.4)


@pytest.mark.parametrize(("counts", "starts"), STEPS)
@pytest.mark.parametrize("visible", [None, (0, None), (0, 3), (1, 3)])
@pytest.mark.parametrize("most", [1 << 24, 150])
def test_a_cap_and_a_sink(
    counts: list[int],
    starts: list[int],
    visible: Visible | None,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MODULE, "MOST_SCORES", most)
    case = Case(counts, starts)
    sink = torch.randn(T, H)
    least, beyond = visible or (-math.inf, None)
    wanted = case.expected(
        lambda at, other: least <= at - other < (beyond or math.inf),
        score=capped,
        sink=sink.T.flatten(),
    )
    got = case.got(visible, score=capped, sink=("gh", sink))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_sink_that_the_groups_share() -> None:
    case, sink = Case([3, 2], [0, 0]), torch.tensor([0.5, -2.0, 30.0])
    wanted = case.expected(lambda at, other: at >= other, sink=sink.repeat_interleave(T))
    got = case.got((0, None), sink=("h", sink))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_gradients_through_a_cap_and_a_sink() -> None:
    grads = []
    for run in ("got", "expected"):
        case = Case([3, 1, 2], [0, 0, 0])
        leaves = [case.q, case.k, case.v, sink := torch.linspace(-1, 1, H * T)]
        for leaf in leaves:
            leaf.requires_grad_()
        if run == "got":
            out = case.got((0, 2), score=capped, sink=("hg", sink.view(H, T)))
        else:
            out = case.expected(lambda at, other: 0 <= at - other < 2, score=capped, sink=sink)
        (out * torch.arange(out.numel()).reshape(out.shape)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_positions_that_are_not_places() -> None:
    case = Case([3, 2], [0, 0], position=torch.tensor([2, 0, 1, 7, 3]))
    wanted = case.expected(lambda at, other: 0 <= at - other < 2)
    torch.testing.assert_close(case.got((0, 2)), wanted, rtol=1e-5, atol=1e-6)


def test_a_mask_of_ones_own() -> None:
    case = Case([3, 2], [2, 0])
    at = case.step.pad(case.step.position)[:, :, None]
    mask = (at + case.step.history_position[:, None]) % 3 == 0
    wanted = case.expected(lambda at, other: (at + other) % 3 == 0)
    torch.testing.assert_close(case.got(None, mask), wanted, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_plain_one() -> None:
    grads = []
    for run in ("got", "expected"):
        case = Case([3, 1, 2], [0, 0, 0])
        leaves = [case.q, case.q_r, case.k, case.k_r, case.v]
        for leaf in leaves:
            leaf.requires_grad_()
        if run == "got":
            out = case.got((0, 2))
        else:
            out = case.expected(lambda at, other: 0 <= at - other < 2)
        (out * torch.arange(out.numel()).reshape(out.shape)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_scores_are_f32_in_bf16() -> None:
    case = Case([40], [0])
    for name in ("q", "q_r", "k", "k_r", "v"):
        setattr(case, name, getattr(case, name).bfloat16())
    got = case.got((0, None))
    assert got.dtype == torch.bfloat16
    wanted = case.expected(lambda at, other: at >= other)
    torch.testing.assert_close(got.float(), wanted, rtol=2**-8, atol=1e-4)


def test_no_tokens() -> None:
    assert Case([0, 0], [2, 1]).got((0, None)).shape == (0, H, T, V)
    assert Case([0, 1], [2, 1]).got((0, None)).shape == (1, H, T, V)


def test_memory_is_bounded_and_no_key_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The largest tensor of a long prompt: MOST_SCORES numbers, or what is given and returned."""
    monkeypatch.setattr(MODULE, "MOST_SCORES", 2048)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    case = Case([100], [0])
    with Watch():
        out = case.got((0, None))
    given = max(x.numel() for x in (case.q, case.q_r, case.k, case.v, out))
    assert 2048 < largest <= given < 10_000
