"""Linear recurrences, many tokens at once.

The state obeys ``S[t] = a[t] S[t-1] + u[t] (x) e[t]`` with ``e[t] = w[t] - r[t] . S[t-1]``, and
what is wanted is ``q[t] . S[t]``. Within a chunk that begins with the state S, written out:

    e[t] = w[t] - P[t-1] r[t] . S - sum over j < t of D[t-1,j] (r[t] . u[j]) e[j]
    q[t] . S[t] = P[t] q[t] . S + sum over j <= t of D[t,j] (q[t] . u[j]) e[j]

where D[i,j] is the product of a[j+1] .. a[i], and P[i] = a[1] .. a[i]. The first line is a
triangular system (Yang et al. 2024, arXiv:2406.06484, section 3); only what is read of S goes from
chunk to chunk. D is made of products, so that a decay may be 0, or of any sign. Sums run in another
order than token by token: in f32 both agree to about 1e-6.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64
CHUNK_PER_KEY = 16  # where each key dim decays for itself, D is so much larger


def chunks(
    state: Tensor,
    scale: Tensor,
    write: Tensor,
    value: Tensor,
    read: Tensor | None,
    query: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence over all tokens.

    Args:
        state: f32 ``[batch, ..., n, v]``, before the first token.
        scale: ``[batch, time, ...]`` or, for each key dim, ``[batch, time, ..., n]``.
        write, query: ``[batch, time, ..., n]``; so is ``read``, None if nothing is.
        value: ``[batch, time, ..., v]``.

    Returns:
        what is read of each state, ``[batch, time, ..., v]``, and the state after the last token.
    """
    per_key = scale.ndim == write.ndim
    time, size = write.shape[1], CHUNK_PER_KEY if per_key else CHUNK
    size = min(size, time)
    vectors = [x for x in (write, value, query, read) if x is not None]
    parts = [_cut(x, time, size, 0.0) for x in vectors]
    decays = _cut(scale if per_key else scale[..., None], time, size, 1.0)
    out = []
    ready = None if per_key else _within(decays, *parts)  # all chunks at once, if that is small
    for k in range(decays.shape[0]):
        one = [x[k] for x in ready] if ready else _within(decays[k], *(x[k] for x in parts))
        from_start, attend, asked, new, *correct = one
        if correct:
            new = new - correct[0] @ state
        out.append(asked @ state + attend @ new)
        written = parts[0][k] * _to_end(decays[k])
        state = from_start[..., -1, :, None] * state + written.mT @ new
    result = torch.cat(out, -2)[..., :time, :]
    return result.movedim(-2, 1), state


def _cut(x: Tensor, time: int, size: int, fill: float) -> Tensor:
    """``[batch, time, ..., n]`` to ``[chunks, batch, ..., size, n]``, filled up at the end."""
    lacking = -time % size
    if lacking:
        shape = (x.shape[0], lacking, *x.shape[2:])
        x = torch.cat([x, torch.full(shape, fill, dtype=x.dtype, device=x.device)], 1)
    return x.unflatten(1, (-1, size)).movedim(1, 0).movedim(2, -2)


def _within(
    scale: Tensor, write: Tensor, value: Tensor, query: Tensor, read: Tensor | None = None
) -> list[Tensor]:
    """What no state decides, of chunks ``[..., C, n]``: the decay since the start of the chunk,
    how tokens attend to each other, what they ask of the state, what they write, and how the state
    corrects that."""
    since = scale.cumprod(-2)
    between = _between(scale)
    attend = _pairs(query, write, between)
    asked = query * since
    if read is None:
        return [since, attend, asked, value]
    before = torch.cat([torch.ones_like(since[..., :1, :]), since[..., :-1, :]], -2)
    earlier = torch.cat([torch.zeros_like(between[..., :1, :, :]), between[..., :-1, :, :]], -3)
    system = _pairs(read, write, earlier)
    both = torch.cat([value, read * before], -1)
    # The diagonal is taken as ones.
    solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    new, correct = solved.split([value.shape[-1], read.shape[-1]], -1)
    return [since, attend, asked, new, correct]


def _between(scale: Tensor) -> Tensor:
    """``[..., C, n]`` to ``[..., C, C, n]``: the product of those after j up to i; 0 for i < j."""
    count = scale.shape[-2]
    after = torch.ones(count, count, dtype=torch.bool, device=scale.device).tril(-1)[..., None]
    each = torch.where(after, scale[..., :, None, :], 1.0).cumprod(-3)
    return each * (after | torch.eye(count, dtype=torch.bool, device=scale.device)[..., None])


def _pairs(left: Tensor, right: Tensor, between: Tensor) -> Tensor:
    """``sum over n of left[i,n] between[i,j,n] right[j,n]``: ``[..., C, C]``."""
    if between.shape[-1] == 1:
        return (left @ right.mT) * between[..., 0]
    return torch.einsum("...in,...ijn,...jn->...ij", left, between, right)


def _to_end(scale: Tensor) -> Tensor:
    """``[..., C, n]``: the product of all after each."""
    later = torch.cat([scale[..., 1:, :], torch.ones_like(scale[..., :1, :])], -2)
    return later.flip(-2).cumprod(-2).flip(-2)
