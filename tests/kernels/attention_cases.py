"""Attention over ragged batches, written plainly: what the kernels are held against."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from backends.triton.families.attention import AttentionSpec, Rows, Term
from backends.triton.kernel import Operator

Lengths = Sequence[tuple[int, int]]  # queries and positions of each sequence


def heads_of(
    heads: int, kv: int, dim: int = 32, value: int | None = None, *, paged: bool = False, **more
) -> AttentionSpec:
    """Grouped-query attention."""
    value = value or dim
    term = Term("n", Rows(heads, dim), Rows(kv, dim, paged=paged))
    return AttentionSpec(heads, (term,), Rows(kv, value, paged=paged), dim**-0.5, **more)


def two_terms(
    heads: int, nope: int, rope: int, value: int, paged: bool = False, **more
) -> AttentionSpec:
    """Keys of each head beside keys that all share."""
    terms = (
        Term("n", Rows(heads, nope), Rows(heads, nope)),
        Term("r", Rows(heads, rope), Rows(1, rope, paged=paged)),
    )
    return AttentionSpec(heads, terms, Rows(heads, value), (nope + rope) ** -0.5, **more)


def latent(heads: int, rank: int, rope: int, paged: bool = True, **more) -> AttentionSpec:
    """All heads share keys, and the first term's key is the value."""
    terms = (
        Term("c", Rows(heads, rank), Rows(1, rank, paged=paged)),
        Term("r", Rows(heads, rope), Rows(1, rope, paged=paged)),
    )
    return AttentionSpec(heads, terms, 0, (rank + rope) ** -0.5, **more)


CAPPED = ("bent = scores / 0.7", "scores = 0.7 * (2 * tl.sigmoid(2 * bent) - 1)")


def capped(scores: Tensor) -> Tensor:
    return 0.7 * torch.tanh(scores / 0.7)


@dataclass
class Case:
    """Random tensors for a spec, and what attention gives."""

    spec: AttentionSpec
    lengths: Lengths
    queries: list[Tensor]
    keys: list[Tensor]
    value: Tensor
    sink: Tensor | None = None

    @staticmethod
    def random(spec: AttentionSpec, lengths: Lengths, seed: int = 0) -> "Case":
        torch.manual_seed(seed)
        dtype = getattr(torch, spec.dtype)
        asked, held = (sum(part) for part in zip(*lengths, strict=True))
        queries = [torch.randn(asked, spec.heads, t.query.dim).to(dtype) for t in spec.terms]
        keys = [torch.randn(held, t.key.heads, t.key.dim).to(dtype) for t in spec.terms]
        if isinstance(spec.value, int):
            value = keys[spec.value]
        else:
            value = torch.randn(held, spec.value.heads, spec.value.dim).to(dtype)
        sink = torch.randn(spec.heads).to(getattr(torch, spec.sink)) if spec.sink else None
        return Case(spec, lengths, queries, keys, value, sink)

    def expected(self) -> Tensor:
        """f32 [queries, heads, value]."""
        results, asked, held = [], 0, 0
        for n, m in self.lengths:
            queries = [q[asked : asked + n].float() for q in self.queries]
            keys = [self._all_heads(k[held : held + m]) for k in self.keys]
            value = self._all_heads(self.value[held : held + m])
            pairs = zip(queries, keys, strict=True)
            scores = sum(torch.einsum("thd,shd->hts", q, k) for q, k in pairs) * self.spec.scale
            if self.spec.score:
                scores = capped(scores)
            scores = scores.masked_fill(~self._seen(n, m), -math.inf)
            if self.sink is not None:
                beside = self.sink.float()[:, None, None].expand(-1, n, 1)
                scores = torch.cat((scores, beside), -1)
            p = torch.softmax(scores, -1)[..., :m]
            nothing = ~self._seen(n, m).any(-1)
            p = p.masked_fill(nothing[:, None], 0)  # who sees nothing gives zeros
            results.append(torch.einsum("hts,shv->thv", p, value))
            asked, held = asked + n, held + m
        return torch.cat(results)

    def _all_heads(self, x: Tensor) -> Tensor:
        return x.float().repeat_interleave(self.spec.heads // x.shape[1], 1)

    def _seen(self, n: int, m: int) -> Tensor:
        gap = torch.arange(m - n, m)[:, None] - torch.arange(m)
        least, beyond = self.spec.visible or (None, None)
        seen = torch.ones_like(gap, dtype=torch.bool)
        if least is not None:
            seen &= gap >= least
        if beyond is not None:
            seen &= gap < beyond
        return seen

    def run(self, kernels: ModuleType, operator: Operator, **more: int | None) -> Tensor:
        """What the generated operator gives, with caches in shuffled pages full of NaN."""
        spec = self.spec
        given = {f"q_{t.name}": q for t, q in zip(spec.terms, self.queries, strict=True)}
        stored = {f"k_{t.name}": (t.key, k) for t, k in zip(spec.terms, self.keys, strict=True)}
        if not isinstance(spec.value, int):
            stored["v"] = (spec.value, self.value)
        table = self._page_table()
        for name, (rows, tensor) in stored.items():
            given[name] = self._paged(tensor, table) if rows.paged else tensor
        asked, held = zip(*self.lengths, strict=True)
        if self.sink is not None:
            given["sink"] = self.sink
        given["q_offsets"] = offsets(asked)
        given["k_offsets"] = offsets(held)
        given["lengths"] = torch.tensor(held, dtype=torch.int32)
        given["page_table"] = table
        names = [a.name for a in operator.kernels[0].arguments if a.name in given]
        if "decode" in operator.name and not spec.paged:
            more["most_positions"] = max(held)
        call = getattr(kernels, operator.name)
        return call(*(given[name] for name in names), most_queries=max(asked), **more)

    def _page_table(self) -> Tensor:
        """int32 [sequences, pages]: pages in no order, with some that nobody uses."""
        counts = [-(-m // self.spec.page) for _, m in self.lengths]
        order = torch.randperm(sum(counts) + 3, dtype=torch.int32)
        table = torch.full((len(counts), max(counts) + 2), -1, dtype=torch.int32)
        begin = 0
        for row, count in enumerate(counts):
            table[row, :count] = order[begin : begin + count]
            begin += count
        return table

    def _paged(self, x: Tensor, table: Tensor) -> Tensor:
        """[pages, page, heads, dim]; what no sequence holds is NaN."""
        page = self.spec.page
        cache = torch.full((int(table.max()) + 4, page, *x.shape[1:]), math.nan, dtype=x.dtype)
        begin = 0
        for row, (_, m) in enumerate(self.lengths):
            for at in range(m):
                cache[table[row, at // page], at % page] = x[begin + at]
            begin += m
        return cache


def offsets(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
