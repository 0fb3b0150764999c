"""Random arguments for attention kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backends.triton.families.attention import AttentionSpec, Rows

if TYPE_CHECKING:
    from torch import Tensor


def example(
    spec: AttentionSpec, names: Sequence[str], sizes: Mapping[str, int], device: str
) -> dict[str, Any]:
    """The arguments of these names, for ``tokens`` queries of ``sequences`` of equal length, with
    ``history`` positions each. Pages of a cache lie in no order."""
    import torch

    sequences, history = sizes["sequences"], sizes["history"]
    each = -(-sizes["tokens"] // sequences)
    pages = -(-history // spec.page)
    dtype = getattr(torch, spec.dtype)

    def stored(rows: Rows) -> Tensor:
        if not rows.paged:
            return packed(rows, sequences * history)
        shape = (sequences * pages, spec.page * rows.token)
        return torch.randn(shape, dtype=dtype, device=device)

    def packed(rows: Rows, count: int) -> Tensor:
        last = (rows.heads - 1) * rows.head + rows.dim
        numbers = torch.randn(count * rows.token + last, dtype=dtype, device=device)
        return numbers.as_strided((count, rows.heads, rows.dim), (rows.token, rows.head, 1))

    def counted(number: int) -> Tensor:
        return torch.arange(sequences + 1, dtype=torch.int32, device=device) * number

    made: dict[str, Any] = {}
    for term in spec.terms:
        made[f"q_{term.name}"] = lambda rows=term.query: packed(rows, sequences * each)
        made[f"k_{term.name}"] = lambda rows=term.key: stored(rows)
    made["v"] = lambda: stored(spec.held)
    made["sink"] = lambda: torch.randn(
        spec.heads, dtype=getattr(torch, spec.sink or "float32"), device=device
    )
    made["q_offsets"] = lambda: counted(each)
    made["k_offsets"] = lambda: counted(history)
    made["lengths"] = lambda: torch.full((sequences,), history, dtype=torch.int32, device=device)
    made["page_table"] = lambda: (
        torch.randperm(sequences * pages, device=device).to(torch.int32).view(sequences, pages)
    )
    made["most_queries"] = lambda: each
    made["most_positions"] = lambda: history
    return {name: made[name]() for name in names}
