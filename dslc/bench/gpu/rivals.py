"""What torch has for the kernels' work.

A maker takes the arguments that our kernel gets, prepares what its own operator wants (that is not
timed), and returns the call that is timed. Where torch lacks the operator it raises, and the table
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from backends.triton.families.attention import AttentionSpec
    from backends.triton.families.router import RouterSpec

Call = Callable[[], Any]
Maker = Callable[..., Call]
COMPILED = "torch.compile"


def _compiled(function: Callable[..., Any]) -> Maker:
    """``torch.compile`` of a function of our kernel's arguments."""

    def make(*arguments: Any) -> Call:
        torch._dynamo.reset()
        fast = torch.compile(function, dynamic=False)
        return lambda: fast(*arguments)

    return make


def norm(width: int, eps: float) -> Mapping[str, Maker]:
    return {COMPILED: _compiled(lambda x, gain: F.rms_norm(x, (width,), gain, eps))}


def norm_of_a_sum(width: int, eps: float) -> Mapping[str, Maker]:
    def both(x: Tensor, added: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        total = x + added
        return F.rms_norm(total, (width,), gain, eps), total

    return {COMPILED: _compiled(both)}


def _codes(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    tiles = x.float().unflatten(-1, (-1, tile))
    most = tiles.abs().amax(-1, keepdim=True)
    scale = torch.where(most == 0, 1.0, most / 448.0)
    return (tiles / scale).to(torch.float8_e4m3fn).flatten(-2), scale[..., 0]


def quantise(tile: int) -> Mapping[str, Maker]:
    return {COMPILED: _compiled(lambda x: _codes(x, tile))}


def norm_in_codes(width: int, eps: float, tile: int) -> Mapping[str, Maker]:
    def codes(x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        return _codes(F.rms_norm(x.float(), (width,), gain.float(), eps), tile)

    return {COMPILED: _compiled(codes)}


def gated_in_codes(tile: int) -> Mapping[str, Maker]:
    def codes(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return _codes(F.silu(gate.float()) * up.float(), tile)

    return {COMPILED: _compiled(codes)}


def rotary(halves: bool) -> Mapping[str, Maker]:
    def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        wide, cos, sin = x.float(), cosine[:, None], sine[:, None]
        a, b = wide.chunk(2, -1) if halves else wide.unflatten(-1, (-1, 2)).unbind(-1)
        both = a * cos - b * sin, b * cos + a * sin
        return (torch.cat(both, -1) if halves else torch.stack(both, -1).flatten(-2)).to(x.dtype)

    return {COMPILED: _compiled(turned)}


def greedy() -> Mapping[str, Maker]:
    return {"torch.argmax": lambda logits: lambda: logits.argmax(-1)}


def drawn() -> Mapping[str, Maker]:
    def choose(logits: Tensor, heat: Tensor, top_p: Tensor, min_p: Tensor, at: Tensor) -> Tensor:
        p, tokens = (logits / heat[:, None]).softmax(-1).sort(-1, descending=True)
        kept = (p.cumsum(-1) - p < top_p[:, None]) & (p >= min_p[:, None] * p[:, :1])
        upto = torch.where(kept, p, 0).cumsum(-1)
        place = torch.searchsorted(upto, at[:, None] * upto[:, -1:], right=True)
        return tokens.gather(-1, place.clamp(max=p.shape[1] - 1))[:, 0]

    return {"torch, sorted": lambda *given: lambda: choose(*given), COMPILED: _compiled(choose)}


def router(spec: RouterSpec) -> Mapping[str, Maker]:
    def route(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        score = logits.sigmoid()
        grouped = (score + bias).unflatten(-1, (spec.groups, -1))
        worth = grouped.topk(spec.best, -1).values.sum(-1)
        best = worth.topk(spec.open_groups, -1).indices
        is_open = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, True)
        allowed = torch.where(is_open[..., None], grouped, spec.closed).flatten(-2)
        pick = allowed.topk(spec.picks, -1).indices
        weight = score.gather(-1, pick)
        return pick, weight / (weight.sum(-1, keepdim=True) + spec.eps) * spec.scale

    return {COMPILED: _compiled(route)}


def dispatch(experts: int) -> Mapping[str, Maker]:
    def sort(pick: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        order = pick.flatten().argsort(stable=True)
        row_of = torch.empty_like(order).scatter(
            0, order, torch.arange(len(order), device=x.device)
        )
        counts = torch.bincount(pick.flatten(), minlength=experts)
        return x[order // pick.shape[1]], row_of.view_as(pick), counts.cumsum(0)

    return {"torch": lambda *given: lambda: sort(*given)}


def combine() -> Mapping[str, Maker]:
    def summed(rows: Tensor, row_of: Tensor, weight: Tensor, added: Tensor) -> Tensor:
        return ((rows[row_of].float() * weight[..., None]).sum(1) + added.float()).to(rows.dtype)

    return {COMPILED: _compiled(summed)}


# -- attention -------------------------------------------------------------------------------------


def _tensors(spec: AttentionSpec, given: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of equally long sequences, [batch, heads, time, dim]."""
    terms = len(spec.terms)
    queries, rest = list(given[:terms]), list(given[terms:])
    keys = rest[:terms]
    value = keys[spec.value] if isinstance(spec.value, int) else rest[terms]
    table = next(
        (x for x in rest if isinstance(x, Tensor) and x.dtype == torch.int32 and x.ndim == 2), None
    )
    offsets = next(x for x in rest if isinstance(x, Tensor) and x.dtype == torch.int32)
    batch = len(offsets) - 1

    def split(x: Tensor, heads: int, dim: int, paged: bool) -> Tensor:
        if paged:
            assert table is not None
            x = x.view(-1, spec.page, heads, dim)[table.long()].flatten(1, 2)
        return x.reshape(batch, -1, heads, dim).transpose(1, 2)

    q = torch.cat(
        [
            split(x, spec.heads, t.query.dim, False)
            for x, t in zip(queries, spec.terms, strict=True)
        ],
        -1,
    )
    parts = [
        split(x, t.key.heads, t.key.dim, t.key.paged) for x, t in zip(keys, spec.terms, strict=True)
    ]
    k = torch.cat([x.expand(-1, spec.kv_heads, -1, -1) for x in parts], -1).contiguous()
    held = spec.held
    v = split(value, held.heads, held.dim, held.paged).expand(-1, spec.kv_heads, -1, -1)
    return q.contiguous(), k, v.contiguous()


def _packed(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(0, 1)


def _sdpa(spec: AttentionSpec, causal: bool) -> Maker:
    def make(*given: Any) -> Call:
        q, k, v = _tensors(spec, given)
        grouped = spec.group > 1
        return lambda: _packed(
            F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=spec.scale, enable_gqa=grouped
            )
        )

    return make


def _flex(spec: AttentionSpec, causal: bool) -> Maker:
    def make(*given: Any) -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v = _tensors(spec, given)
        mask = None
        if causal:
            mask = create_block_mask(
                lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=q.device
            )
        torch._dynamo.reset()
        fast = torch.compile(flex_attention, dynamic=False)
        grouped = spec.group > 1
        return lambda: _packed(fast(q, k, v, scale=spec.scale, block_mask=mask, enable_gqa=grouped))

    return make


def prefill(spec: AttentionSpec) -> Mapping[str, Maker]:
    return {"SDPA": _sdpa(spec, True), "FlexAttention": _flex(spec, True)}


def decode(spec: AttentionSpec) -> Mapping[str, Maker]:
    return {"SDPA": _sdpa(spec, False), "FlexAttention": _flex(spec, False)}


# -- products --------------------------------------------------------------------------------------


def _widened(codes: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    wide = scales.repeat_interleave(rows, -2)[..., : codes.shape[-2], :]
    wide = wide.repeat_interleave(columns, -1)[..., : codes.shape[-1]]
    return (codes.float() * wide).bfloat16()


def plain_gemm() -> Mapping[str, Maker]:
    return {"torch.mm": lambda a, w: lambda: a @ w.T}


def gemm() -> Mapping[str, Maker]:
    def scaled(a: Tensor, a_scales: Tensor, w: Tensor, w_scales: Tensor) -> Call:
        return lambda: torch._scaled_mm(
            a, w.T, scale_a=a_scales, scale_b=w_scales.T, out_dtype=torch.bfloat16
        )

    def plain(a: Tensor, a_scales: Tensor, w: Tensor, w_scales: Tensor) -> Call:
        x, y = _widened(a, a_scales, 1, 128), _widened(w, w_scales, 128, 128)
        return lambda: x @ y.T

    return {"torch.mm of BF16": plain, "torch._scaled_mm": scaled}


def grouped(coded: bool) -> Mapping[str, Maker]:
    def wide(a: Tensor, w: Tensor, offsets: Tensor) -> Call:
        return lambda: F.grouped_mm(a, w.transpose(1, 2), offs=offsets[1:])

    def dequantised(a: Tensor, a_scales: Tensor, w: Tensor, w_scales: Tensor, at: Tensor) -> Call:
        return wide(_widened(a, a_scales, 1, 128), _widened(w, w_scales, 128, 128), at)

    return {"F.grouped_mm of BF16": dequantised if coded else wide}
