"""What ``model.py`` is traced with: a step of one token, and operations a compiler can see through.

The emitted text runs unchanged, with this module's names in the place of the runtime's. Each gives
what the runtime's gives, for one token; what differs is the form: no numbers are read from tensors,
blocks are chosen by index instead of in a loop, and the history's length is symbolic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from backends.pytorch.ahead.blocks import Blocks
from backends.pytorch.runtime import (
    Cache,
    Numbered,
    Step,
    gather,
    inf,
    largest,
    making,
    named,
    smallest,
    softmax,
)
from backends.pytorch.runtime.attention import (
    Score,
    Sink,
    Term,
    Visible,
    logit_of,
    softmax_with,
)

__all__ = [
    "Cache",
    "Numbered",
    "OneToken",
    "Step",
    "apply",
    "attention",
    "experts",
    "gather",
    "in_top",
    "inf",
    "largest",
    "making",
    "named",
    "smallest",
    "softmax",
    "stacks",
    "table",
    "top",
    "with_weights",
]

# Up to this many candidates are ranked by comparing each with each, which a compiler fuses; more
# are sorted.
MOST_RANKED = 512

Extend = Callable[[str, Tensor], Tensor]
Stacked = Callable[[nn.Module], "dict[str, Tensor | Blocks]"]

_stacks: ContextVar[Stacked] = ContextVar("stacks")
_within: ContextVar[bool] = ContextVar("within", default=False)  # a chosen block


class OneToken(Step):
    """The next token of one sequence, at a place in its history that only a run knows.

    Args:
        index: int64 [1], the token's place.
        extend: given a cache's path and the packed value [1, ...], writes it and returns the
            history, [history, ...].
        history: its length, this token included; an int or a symbol, None where no cache tells.
    """

    def __init__(self, index: Tensor, extend: Extend, history: Any):
        super().__init__([1])
        self.index = index
        self.sequence = torch.zeros_like(index)
        self.offset = torch.zeros_like(index)
        self.history_valid = self.time_valid = None
        self._extend = extend
        self._history = history

    @property
    def history(self) -> Any:
        if self._history is None:
            raise NotImplementedError("positions of a history are read of which nothing is kept")
        return self._history

    @history.setter
    def history(self, history: Any) -> None:
        self._history = history

    @property
    def history_position(self) -> Tensor:
        return torch.arange(self.history)[None]

    @property
    def history_index(self) -> Tensor:
        return torch.arange(self.history)[None]

    def extend(self, module: nn.Module, name: str, x: Tensor, axis: int = 0) -> Tensor:
        if axis != 0:
            raise NotImplementedError(f"{module.path}.{name} is kept with time behind other dims")
        return self._extend(f"{module.path}.{name}", x)[None]

    def recent(self, module: nn.Module, name: str, *_: Any, **__: Any) -> Tensor:
        raise NotImplementedError(f"{module.path}.{name} is kept without positions, as a state is")

    def scan(self, module: nn.Module, name: str, *_: Any, **__: Any) -> Tensor:
        raise NotImplementedError(f"{module.path}.{name} is a state, not a history")

    def before(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("a history is read at another token")

    def remembered(self, key: object, make: Callable[[], Any]) -> Any:
        return make()

    def history_mean(self, x: Tensor, axis: int) -> Tensor:
        return x.mean(axis)

    def time_mean(self, x: Tensor, axis: int) -> Tensor:
        return x.sum(axis)


def table(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A table is computed in place: a compiler folds it, or fuses it."""
    return method


def attention(
    step: OneToken,
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
    """See ``runtime.attention``: keys and values are [1, history, ...]."""
    wide = {id(x): x[0].float() for x in (*(key for *_, key in terms), value[1])}
    products = [torch.einsum(eq, query.float() * scale, wide[id(key)]) for eq, query, key in terms]
    scores = sum(products[1:], products[0])
    scores = scores if score is None else score(scores)
    seen = None if mask is None else mask[0]
    least, beyond = visible or (None, None)
    gap = step.index[:, None] - step.history_position
    if least is not None and least > 0:
        seen = gap >= least if seen is None else seen & (gap >= least)
    if beyond is not None:
        seen = gap < beyond if seen is None else seen & (gap < beyond)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sink is None:
        p = torch.softmax(scores, -1)
    else:
        p = softmax_with(logit_of(sink, terms[0][0].split("->")[1]), scores)
    if seen is not None:
        p = p.masked_fill(~seen, 0)
    return torch.einsum(value[0], p, wide[id(value[1])]).to(dtype or value[1].dtype)


def top(x: Tensor, count: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """See ``runtime.top``."""
    if not _rankable(x, axis):
        values, places = torch.sort(x, dim=axis, descending=True, stable=True)
        return values.narrow(axis, 0, count), places.narrow(axis, 0, count)
    x = x.movedim(axis, -1)
    wanted = torch.arange(count, device=x.device)[:, None]
    along = torch.arange(x.shape[-1], device=x.device)
    places = torch.where(_ranks(x)[..., None, :] == wanted, along, 0).sum(-1)
    places = places.clamp(max=x.shape[-1] - 1)  # NaN are before nothing: all of them are first
    return x.gather(-1, places).movedim(-1, axis), places.movedim(-1, axis)


def in_top(x: Tensor, count: int, axis: int = -1) -> Tensor:
    """See ``runtime.in_top``."""
    if _rankable(x, axis):
        return (_ranks(x.movedim(axis, -1)) < count).movedim(-1, axis) & (x > -inf)
    order = torch.sort(x, dim=axis, descending=True, stable=True)[1]
    return (torch.argsort(order, dim=axis) < count) & (x > -inf)


def _rankable(x: Tensor, axis: int) -> bool:
    size = x.shape[axis]
    return isinstance(size, int) and size <= MOST_RANKED


def _ranks(x: Tensor) -> Tensor:
    """int64: how many along the last axis come before each, largest first, ties in order."""
    along = torch.arange(x.shape[-1], device=x.device)
    mine, other = x[..., :, None], x[..., None, :]
    before = (other > mine) | ((other == mine) & (along < along[:, None]))
    return before.sum(-1)


@contextmanager
def stacks(of: Stacked) -> Iterator[None]:
    """Within, ``of(blocks)`` gives the parameters of an array's blocks, stacked, by name."""
    token = _stacks.set(of)
    try:
        yield
    finally:
        _stacks.reset(token)


def apply(
    blocks: nn.ModuleList,
    pick: Tensor,
    *args: Tensor,
    start: int = 0,
    method: str = "forward",
    whole: Sequence[int] = (),
) -> Tensor:
    """See ``runtime.apply``: the picked blocks' weights are read where they are, by index."""
    if _within.get():
        raise NotImplementedError("a block that is chosen by index chooses blocks itself")
    block = blocks[start]
    first = next(i for i, b in enumerate(blocks.children()) if b is block)
    chosen = pick.flatten() + first
    stacked = _stacks.get()(blocks)
    weights = {n: w.index_select(0, chosen) for n, w in stacked.items() if isinstance(w, Tensor)}
    blocked = {n: w for n, w in stacked.items() if isinstance(w, Blocks)}
    rows = [
        a if i in whole else a.expand(*pick.shape, *a.shape[pick.ndim :]).flatten(0, pick.ndim - 1)
        for i, a in enumerate(args)
    ]

    def one(own: dict[str, Tensor], number: Tensor, *given: Tensor) -> Tensor:
        under = tuple(a if i in whole else a[None] for i, a in enumerate(given))
        picked = {n: w.picked(number) for n, w in blocked.items()}
        called = getattr(type(block), method)
        held: dict[str, Tensor | Blocks] = {**own, **picked}
        return with_weights(block, called, held, (block, *under))[0]

    over = (0, 0, *(None if i in whole else 0 for i in range(len(rows))))
    token = _within.set(True)
    try:
        results: Tensor = torch.vmap(one, over)(weights, chosen, *rows)
    finally:
        _within.reset(token)
    return results.unflatten(0, pick.shape)


def experts(
    blocks: nn.ModuleList,
    pick: Tensor,
    gate: Tensor,
    *args: Tensor,
    start: int = 0,
    method: str = "forward",
    whole: Sequence[int] = (),
) -> Tensor:
    """See ``runtime.experts``."""
    results = apply(blocks, pick, *args, start=start, method=method, whole=whole)
    dtype = torch.promote_types(gate.dtype, results.dtype)
    weights = gate.expand(pick.shape).float()
    weights = weights.reshape(*pick.shape, *[1] * (results.ndim - pick.ndim))
    return (weights * results.float()).sum(pick.ndim - 1).to(dtype)


def with_weights(
    owner: nn.Module,
    method: Callable[..., Tensor],
    weights: Mapping[str, Tensor | Blocks],
    args: Sequence[Any],
) -> Tensor:
    """What a method gives while the owner's weights are these."""
    plain = {f"owner.{n}": w for n, w in weights.items() if isinstance(w, Tensor)}
    with ExitStack() as stack:
        for path, blocks in weights.items():
            if isinstance(blocks, Blocks):
                place, _, name = path.rpartition(".")
                stack.enter_context(_instead(owner.get_submodule(place), name, blocks))
        call = _Call(owner, method)
        result: Tensor = torch.func.functional_call(call, plain, tuple(args), strict=False)
    return result


@contextmanager
def _instead(module: nn.Module, name: str, blocks: Blocks) -> Iterator[None]:
    """Within, an attribute is no parameter: what stands in the instance is found first."""
    before = module.__dict__.get(name)  # of a caller
    module.__dict__[name] = blocks
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


class _Call(nn.Module):
    """A method of a module, so that the module's weights can be replaced while it runs."""

    def __init__(self, owner: nn.Module, method: Callable[..., Tensor]):
        super().__init__()
        self.owner = owner
        self.method = method

    def forward(self, *args: Any) -> Tensor:
        return self.method(*args)
