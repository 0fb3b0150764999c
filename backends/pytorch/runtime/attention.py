"""Attention over the histories of a step's sequences, a stretch of queries at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from backends.pytorch.runtime.step import Step

# Scores held at once, in numbers. Prompts are taken in stretches of queries whose scores stay in a
# processor's cache (2 MB of f32), and which read no further than they see; but of no fewer than
# makes a product fast, as long as that fits into 64 MB.
FAST_SCORES, FAST_QUERIES = 1 << 19, 64
MOST_SCORES = 1 << 24

Term = tuple[str, Tensor, Tensor]
Visible = tuple[int | None, int | None]
Score = Callable[[Tensor], Tensor]
Sink = tuple[str, Tensor]


def attention(
    step: Step,
    terms: Sequence[Term],
    value: tuple[str, Tensor],
    *,
    scale: float = 1.0,
    visible: Visible | None = None,
    mask: Tensor | None = None,
    score: Score | None = None,
    sink: Sink | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Softmax over the history of a sum of score products, times a value.

    Equations are einsum's, without the sequences' axis; ``t`` stands for the step's tokens, ``s``
    for the history. A key or value that lacks a head's letter is shared by the heads and never
    repeated. Scores and probabilities are f32. A token that sees nothing gives zeros.

    Args:
        terms: ``("thn,shn->hts", query, key)``: queries are packed, keys ``[batch, ...]``; all
            terms have the same result, which ends in ``ts``.
        value: ``("hts,shv->thv", value)``, the value ``[batch, ...]``.
        scale: what the sum of the terms is multiplied by.
        visible: (least, beyond): position p sees q where least <= p - q < beyond; None is no
            bound, so (0, None) is causal. None instead of both: everything is visible.
        mask: bool ``[batch, time, history]``, True where visible.
        score: an elementwise function of the scaled sum, f32 ``[batch, ..., time, history]``: a
            soft cap.
        sink: ``("h", logit)``: one more logit of each head in the softmax, which takes its share
            and gives no value. A token that sees nothing else gives zeros.
        dtype: of the result; that of the value unless given.

    Returns:
        Packed, with the axes of the value's equation: ``[total, h, v]`` for ``thv``.
    """
    used = "".join([equation for equation, _, _ in terms] + [value[0]])
    batch = next(letter for letter in "bBzZyY" if letter not in used)
    scored = [(*_subscripts(equation, batch), query, key) for equation, query, key in terms]
    # The scale goes to the queries, which are fewer than the scores.
    queries = [step.pad(q, left.index("t") - 1).float() * scale for _, left, _, q, _ in scored]
    # A value may be a key as well: it is widened once.
    wide = {id(x): x.float() for x in (*(key for *_, key in scored), value[1])}
    keys, values = [wide[id(key)] for *_, key in scored], wide[id(value[1])]
    summed, scores, held = _subscripts(value[0], batch)
    axis = summed.split("->")[1].index("t")
    sizes: dict[str, int] = {}
    for (_, left, right, *_), query, key in zip(scored, queries, keys, strict=True):
        sizes |= zip(left + right, (*query.shape, *key.shape), strict=True)
    per_query = prod(sizes[letter] for letter in scores if letter != "t")
    extra = None if sink is None else logit_of(sink, scores)
    out = []
    for begin, end in _stretches(step.time, per_query):
        sight = _Sight(step, visible, mask, begin, end)
        total: Tensor | None = None
        for (equation, left, right, *_), query, key in zip(scored, queries, keys, strict=True):
            stretch = query.narrow(left.index("t"), begin, end - begin)
            product = torch.einsum(equation, stretch, sight.near(key, right.index("s")))
            if total is None:
                total = product
            else:
                total = total + product if total.requires_grad else total.add_(product)
        assert total is not None
        total = total if score is None else score(total)
        seen = sight.near(values, held.index("s"))
        out.append(torch.einsum(summed, sight.softmax(total, extra), seen))
    joined = out[0] if len(out) == 1 else torch.cat(out, dim=axis)
    return step.pack(joined, axis - 1).to(dtype or value[1].dtype)


def logit_of(sink: Sink, scores: str) -> Tensor:
    """A sink beside scores with these subscripts: f32, of length 1 along all that it lacks."""
    letters, logit = sink
    wanted = [letter for letter in scores if letter in letters]
    logit = logit.permute([letters.index(letter) for letter in wanted]).float()
    shape = dict(zip(wanted, logit.shape, strict=True))
    return logit.reshape([shape.get(letter, 1) for letter in scores])


def softmax_with(logit: Tensor, scores: Tensor) -> Tensor:
    """A softmax along the last axis with one more logit in its denominator."""
    high = torch.maximum(scores.amax(-1, keepdim=True), logit).detach()
    if scores.requires_grad or logit.requires_grad:
        e = torch.exp(scores - high)
        return e / (e.sum(-1, keepdim=True) + torch.exp(logit - high))
    e = scores.sub_(high).exp_()
    return e.div_(e.sum(-1, keepdim=True) + torch.exp(logit - high))


@lru_cache(maxsize=256)
def _subscripts(equation: str, batch: str) -> tuple[str, str, str]:
    """The equation with a letter for the batch in front, and its two operands' subscripts."""
    operands, result = equation.split("->")
    left, right = (batch + operand for operand in operands.split(","))
    return f"{left},{right}->{batch}{result}", left, right


def _stretches(time: int, per_query: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries whose scores fit into ``MOST_SCORES``; one, perhaps empty, at least."""
    per_query = max(per_query, 1)
    fast = max(FAST_SCORES // per_query, FAST_QUERIES)
    length = max(min(fast, MOST_SCORES // per_query), 1)
    yield 0, min(length, time)
    for begin in range(length, time, length):
        yield begin, min(begin + length, time)


class _Sight:
    """What a stretch of queries sees: a range of the history, and a mask within it."""

    def __init__(
        self, step: Step, visible: Visible | None, mask: Tensor | None, begin: int, end: int
    ):
        self.low, self.high = 0, step.history
        self.may_see_nothing = mask is not None
        if visible is not None:
            least, beyond = visible
            # Every token sees itself, unless the predicate says otherwise.
            self.may_see_nothing |= least is not None and least > 0
            self.may_see_nothing |= beyond is not None and beyond <= 0
            if step.in_order and end > begin:
                # Positions are places in the history: what no query sees is left out.
                if beyond is not None:
                    first = min(step.starts) + begin - beyond + 1
                    self.low = min(max(0, first), step.history)
                if least is not None:
                    self.high = min(self.high, max(step.starts) + end - least)
                self.high = max(self.low, self.high)
        seen = step.remembered(
            ("visible", visible, begin, end), lambda: self._visible(step, visible, begin, end)
        )
        if mask is not None:
            given = mask[:, begin:end, self.low : self.high]
            seen = given if seen is None else seen & given
        self.mask = seen

    def _visible(self, step: Step, visible: Visible | None, begin: int, end: int) -> Tensor | None:
        """bool ``[batch, time, history]`` of the stretch; None where everything is visible."""
        history = slice(self.low, self.high)
        seen = None if step.history_valid is None else step.history_valid[:, None, history]
        at_the_end = step.in_order and step.time == 1 and len(set(step.starts)) <= 1
        if visible is None:
            return seen
        least, beyond = visible
        if at_the_end and (least is None or least <= 0):
            return seen  # the newest token alone: what is out of its window is not in the range
        position = step.pad(step.position)[:, begin:end, None].int()
        gap = position - step.history_position[:, None, history].int()
        bounds = [gap >= least] if least is not None else []
        bounds += [gap < beyond] if beyond is not None else []
        for within in bounds:
            seen = within if seen is None else within & seen
        return seen

    def near(self, x: Tensor, axis: int) -> Tensor:
        """The range of the history that is seen, of a tensor with the history at ``axis``."""
        return x.narrow(axis, self.low, self.high - self.low)

    def softmax(self, scores: Tensor, sink: Tensor | None) -> Tensor:
        """Probabilities of ``[batch, ..., time, history]``, in f32."""

        def softmax(scores: Tensor) -> Tensor:
            if sink is None or not scores.shape[-1]:
                return torch.softmax(scores, -1)
            return softmax_with(sink, scores)

        if self.mask is None:
            return softmax(scores)
        shape = (self.mask.shape[0], *[1] * (scores.ndim - 3), *self.mask.shape[1:])
        unseen = ~self.mask.reshape(shape)
        # The least finite number, not -inf: a row that sees nothing stays without NaN, forward
        # and backward.
        least = torch.finfo(scores.dtype).min
        if scores.requires_grad:
            p = softmax(scores.masked_fill(unseen, least))
            return p.masked_fill(unseen, 0) if self.may_see_nothing else p
        p = softmax(scores.masked_fill_(unseen, least))  # they are nobody else's
        return p.masked_fill_(unseen, 0) if self.may_see_nothing else p
