"""Arrays of blocks indexed by data: rows are grouped by the block they picked.

A block runs once, on the rows that picked it, with its weights where they are. Blocks that nobody
picked cost nothing, neither time nor Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod

import torch
from torch import Tensor, nn

# Told of the picks of every array of blocks: its path, int64 ``[..., picks]``.
Watch = Callable[[str, Tensor], None]
_watches: list[Watch] = []


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Within, ``watch`` is told of all picks."""
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


def picked(blocks: nn.Module, pick: Tensor) -> None:
    """Tell who watches."""
    for watch in _watches:
        watch(str(blocks.path), pick)


MOST_KEPT = 1 << 26  # numbers: more are given back with the next smaller ones

Block = Callable[..., Tensor]

STRETCH = 128  # tokens whose blocks' results are summed at once: they stay in a cache


def apply(
    blocks: nn.ModuleList,
    pick: Tensor,
    *args: Tensor,
    start: int = 0,
    method: str = "forward",
    whole: Sequence[int] = (),
) -> Tensor:
    """Run, for each element of ``pick``, the block of that number on the element's rows.

    Args:
        pick: int64 ``[*rows]``, counted from 0.
        args: ``[*rows, ...]`` each, where an axis of rows may have length 1: the same for all.
        start: the number of the first block, for ``Numbered`` ones.
        method: which of the block's methods.
        whole: which of the args have no axes of rows, and are given to every block as they are.

    Returns:
        ``[*rows, ...]``.
    """
    picked(blocks, pick)
    results, back = _run(blocks, pick, args, start, method, whole)
    return results.index_select(0, back).unflatten(0, pick.shape)


def experts(
    blocks: nn.ModuleList,
    pick: Tensor,
    gate: Tensor,
    *args: Tensor,
    start: int = 0,
    method: str = "forward",
    whole: Sequence[int] = (),
) -> Tensor:
    """The sum over the last axis of ``pick`` of gate * block[pick](args).

    Args:
        pick: int64 ``[*rows, picks]``, counted from 0.
        gate: ``[*rows, picks]``, or with axes of length 1.
        args, start, method, whole: as of ``apply``.

    Returns:
        ``[*rows, ...]``, summed in f32; f32 if the gate is, else the blocks' dtype.
    """
    picked(blocks, pick)
    picks, tokens = pick.shape[-1], pick.shape[:-1].numel()
    weights = gate.expand(pick.shape).reshape(tokens, picks).float()
    if not torch.is_grad_enabled():
        groups = _groups(blocks, pick, start, method)
        parts = ((mine, block(*_taken(args, pick.shape, mine, whole))) for block, mine in groups)
        total, width = _summed(parts, weights)
        dtype = torch.promote_types(gate.dtype, width)
        return total.unflatten(0, pick.shape[:-1]).to(dtype)
    results, back = _run(blocks, pick, args, start, method, whole)
    sums = []
    for begin in range(0, max(tokens, 1), STRETCH):  # the rows in f32 are large: some at a time
        places = back[begin * picks : (begin + STRETCH) * picks]
        rows = results.index_select(0, places).unflatten(0, (-1, picks)).float()
        sums.append(torch.einsum("tk,tk...->t...", weights[begin : begin + STRETCH], rows))
    total = sums[0] if len(sums) == 1 else torch.cat(sums)
    dtype = torch.promote_types(gate.dtype, results.dtype)
    return total.unflatten(0, pick.shape[:-1]).to(dtype)


def _summed(parts: Iterable[tuple[Tensor, Tensor]], weights: Tensor) -> tuple[Tensor, torch.dtype]:
    """The weighted sums of the blocks' results, f32 ``[tokens, ...]``, and the results' dtype.

    Without gradients, large intermediates lie in memory that is kept: where pages are given back
    and taken anew in each layer, that costs as much as the products.

    Args:
        parts: rows (int64, counted over ``[tokens, picks]``) and a block's results for them.
    """
    tokens, picks = weights.shape
    with ExitStack() as stack:
        rows: Tensor | None = None
        for mine, result in parts:
            if rows is None:
                size = (tokens * picks, *result.shape[1:])
                rows = stack.enter_context(_borrowed("results", size, result))
            rows.index_copy_(0, mine, result)
        assert rows is not None
        shape = rows.shape[1:]
        rows = rows.reshape(tokens, picks, prod(shape))
        total = torch.empty(tokens, 1, prod(shape), device=rows.device)
        wide = stack.enter_context(_borrowed("wide", rows[:STRETCH].shape, total))
        for begin in range(0, tokens, STRETCH):
            part = rows[begin : begin + STRETCH]
            gates = weights[begin : begin + STRETCH, None]
            sums = total[begin : begin + STRETCH]
            torch.bmm(gates, wide[: len(part)].copy_(part), out=sums)
    return total.reshape(tokens, *shape), rows.dtype


_memory = threading.local()


@contextmanager
def _borrowed(name: str, shape: Sequence[int], like: Tensor) -> Iterator[Tensor]:
    """Memory of this thread that is used again: what it holds is lost afterwards. Whoever needs
    some of that name meanwhile, a block within a block, gets other memory."""
    held: dict[str, Tensor] = _memory.__dict__
    key, size = f"{name} {like.dtype} {like.device}", prod(shape)
    memory = held.pop(key, None)
    if memory is None or not size <= memory.numel() <= max(size, MOST_KEPT):
        with torch.inference_mode(False):  # so that all later runs may write to it
            memory = torch.empty(size, dtype=like.dtype, device=like.device)
    try:
        yield memory[:size].view(*shape)
    finally:
        held[key] = memory


def _run(
    blocks: nn.ModuleList,
    pick: Tensor,
    args: Sequence[Tensor],
    start: int,
    method: str,
    whole: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """What the blocks give, ordered by block, and (int64) the place of each row of ``pick``."""
    order, results = [], []
    for block, mine in _groups(blocks, pick, start, method):
        order.append(mine)
        results.append(block(*_taken(args, pick.shape, mine, whole)))
    return torch.cat(results), torch.cat(order).argsort()


def _groups(
    blocks: nn.ModuleList, pick: Tensor, start: int, method: str
) -> Iterator[tuple[Block, Tensor]]:
    """Each block that was picked, with its rows (int64, ascending); some block if there are none.

    Raises:
        IndexError: a pick is no number of a block.
    """
    flat = pick.flatten()
    order = flat.argsort(stable=True)
    numbers, counts = torch.unique_consecutive(flat[order], return_counts=True)
    chosen = numbers.tolist()
    if chosen and not 0 <= chosen[0] <= chosen[-1] < len(blocks):
        raise IndexError(f"picks {chosen[0]} .. {chosen[-1]} of {len(blocks)} blocks")
    for number, mine in zip(chosen, order.split(counts.tolist()), strict=True):
        yield _method(blocks[start + number], method), mine
    if not chosen:  # no rows: any block knows the shape of its result
        yield _method(blocks[start], method), order


def _method(block: nn.Module, name: str) -> Block:
    return block if name == "forward" else getattr(block, name)


def _taken(
    args: Sequence[Tensor], shape: torch.Size, mine: Tensor, whole: Sequence[int]
) -> list[Tensor]:
    return [a if i in whole else _rows(a, shape, mine) for i, a in enumerate(args)]


def _rows(arg: Tensor, shape: torch.Size, mine: Tensor) -> Tensor:
    """Rows ``mine`` of an argument, counted row-major over ``shape``."""
    lead = arg.shape[: len(shape)]
    if lead == shape:
        return arg.flatten(0, len(shape) - 1).index_select(0, mine)
    if arg.shape[: len(shape)].numel() == 1:  # one token: the same for all its experts
        return arg.flatten(0, len(shape) - 1).expand(mine.numel(), *arg.shape[len(shape) :])
    index, below, stride = torch.zeros_like(mine), 1, 1
    for size, own in zip(reversed(shape), reversed(lead), strict=True):
        if own > 1:
            index = index + mine // below % size * stride
            stride *= own
        below *= size
    return arg.flatten(0, len(shape) - 1).index_select(0, index)
