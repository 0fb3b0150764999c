"""What is timed: kernels at the sizes of published models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backends.triton.families import (
    attention_decode,
    attention_prefill,
    combine,
    dispatch,
    gemm,
    grouped_gemm,
    quantise,
    rms_norm,
    rotary,
    router,
    sampling,
)
from backends.triton.families.attention import AttentionSpec, Rows, Term
from backends.triton.families.formats import Quantised
from backends.triton.kernel import Operator
from backends.triton.targets import Target
from dslc.bench.gpu import published, rivals
from dslc.bench.gpu.published import Published

if TYPE_CHECKING:
    from torch import Tensor

Example = Callable[[Mapping[str, int], str], tuple[Any, ...]]

ROWS = Quantised("float8_e4m3fn", "float32", 1, 128)
BLOCKS = Quantised("float8_e4m3fn", "float32", 128, 128)


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        sizes: as the operator's ``traffic`` and ``example`` take them.
        example: the launcher's arguments at those sizes.
        rivals: what torch has for the same arguments; see ``rivals``.
        near: how far results may be from the first rival's, relative to the largest; None: they
            are not compared (a draw, an order that is free).
    """

    name: str
    operator: Operator
    sizes: Mapping[str, int]
    example: Example
    rivals: Mapping[str, rivals.Maker]
    published: Published | None = None
    near: float | None = 2e-2


def cases(target: Target) -> Iterator[Case]:
    """All of them, the quick ones first."""
    yield from _small(target)
    yield from _routing(target)
    yield from _attention(target)
    if target.fp8:
        yield from _products(target)


def _case(
    name: str,
    operator: Operator,
    sizes: Mapping[str, int],
    others: Mapping[str, rivals.Maker],
    **more: Any,
) -> Case:
    example = more.pop("example", None) or operator.example
    assert example is not None, name
    return Case(name, operator, sizes, example, others, **more)


def _small(target: Target) -> Iterator[Case]:
    for tokens in (128, 4096):
        at, sizes = f"{tokens:,} tokens", {"tokens": tokens}
        norm = rms_norm.generate(rms_norm.RMSNorm(7168, 1e-6), target)
        yield _case(
            f"RMSNorm 7168, {at}", norm, sizes, rivals.norm(7168, 1e-6), example=_norm_example
        )
        codes = quantise.generate(quantise.Quantise(7168, ROWS), target)
        yield _case(
            f"quantise 7168 to FP8, {at}",
            codes,
            sizes,
            rivals.quantise(128),
            example=lambda s, device: (_random(s["tokens"], 7168, device),),
            near=None,
        )
        turned = rotary.generate(rotary.RotarySpec(128, 64, False, 128 * 192, 192), target)
        yield _case(f"rotary 128 x 64, {at}", turned, sizes, rivals.rotary(False))
    for sequences in (1, 128):
        at, sizes = f"{sequences} sequences", {"sequences": sequences}
        greedy = sampling.generate(sampling.SamplingSpec(129280, greedy=True), target)
        yield _case(f"greedy token of 129,280, {at}", greedy, sizes, rivals.greedy(), near=0)
        drawn = sampling.generate(sampling.SamplingSpec(129280), target)
        yield _case(f"drawn token of 129,280, {at}", drawn, sizes, rivals.drawn(), near=None)


def _routing(target: Target) -> Iterator[Case]:
    spec = router.RouterSpec(256, 8, "sigmoid", True, 8, 4, 2, normalise=True, eps=1e-20, scale=2.5)
    for tokens in (128, 4096):
        at, sizes = f"{tokens:,} tokens", {"tokens": tokens}
        yield _case(
            f"router 8 of 256, {at}",
            router.generate(spec, target),
            sizes,
            rivals.router(spec),
            near=None,
        )
        yield _case(
            f"dispatch 8 of 256 x 7168, {at}",
            dispatch.generate(dispatch.DispatchSpec(256, 8, 7168), target),
            sizes,
            rivals.dispatch(256),
        )
        yield _case(
            f"combine 8 x 7168, {at}",
            combine.generate(combine.CombineSpec(8, 7168, 1), target),
            sizes,
            rivals.combine(),
        )


# Latent attention with keys and values of each head, as prompts take it, and absorbed, as decoding
# does; and grouped-query attention of 8B models, with 32 heads of which 4 share keys.
LATENT_PREFILL = AttentionSpec(
    128,
    (
        Term("n", Rows(128, 128, 128 * 192, 192), Rows(128, 128, 128 * 256, 256)),
        Term("r", Rows(128, 64), Rows(1, 64)),
    ),
    Rows(128, 128, 128 * 256, 256),
    0.1352337788608801,
)
LATENT_DECODE = AttentionSpec(
    128,
    (
        Term("c", Rows(128, 512), Rows(1, 512, paged=True)),
        Term("r", Rows(128, 64), Rows(1, 64, paged=True)),
    ),
    0,
    0.1352337788608801,
)
GROUPED_PREFILL = AttentionSpec(
    32, (Term("n", Rows(32, 128), Rows(8, 128)),), Rows(8, 128), 128**-0.5
)
GROUPED_DECODE = AttentionSpec(
    32,
    (Term("n", Rows(32, 128), Rows(8, 128, paged=True)),),
    Rows(8, 128, paged=True),
    128**-0.5,
)


def _attention(target: Target) -> Iterator[Case]:
    for name, spec, figure in (
        ("latent prefill attention 128 x 192/128", LATENT_PREFILL, published.prefill()),
        ("grouped prefill attention 32/8 x 128", GROUPED_PREFILL, None),
    ):
        operator = attention_prefill.generate(spec, target)
        sizes = {"tokens": 4096, "history": 4096, "sequences": 1}
        others = rivals.prefill(spec)
        yield _case(f"{name}, 4,096 tokens", operator, sizes, others, published=figure)
    for name, spec in (
        ("latent decode attention 128 x 576/512", LATENT_DECODE),
        ("grouped decode attention 32/8 x 128", GROUPED_DECODE),
    ):
        operator = attention_decode.generate(spec, target)
        for sequences in published.DECODE:
            sizes = {"tokens": sequences, "history": 4096, "sequences": sequences}
            figure = published.decode(sequences) if spec is LATENT_DECODE else None
            yield _case(
                f"{name}, {sequences} x 4,096",
                operator,
                sizes,
                rivals.decode(spec),
                published=figure,
            )


def _products(target: Target) -> Iterator[Case]:
    for (n, k), times in published.GEMM.items():
        operator = gemm.generate(gemm.Gemm(n, k, weights=BLOCKS, activations=ROWS), target)
        for tokens in times:
            yield _case(
                f"FP8 GEMM {n} x {k}, {tokens:,} tokens",
                operator,
                {"tokens": tokens},
                rivals.gemm(),
                example=lambda s, device, n=n, k=k: _coded(s["tokens"], n, k, device),
                published=published.gemm(n, k, tokens),
            )
    for n, k in ((4096, 7168), (7168, 2048)):
        spec = grouped_gemm.GroupedGemm(8, n, k, weights=BLOCKS, activations=ROWS)
        coded = grouped_gemm.generate(spec, target)
        plain = grouped_gemm.generate(grouped_gemm.GroupedGemm(8, n, k), target)
        for tokens in (512, 32768):
            at, sizes = f"8 x {n} x {k}, {tokens:,} rows", {"tokens": tokens}
            yield _case(
                f"grouped FP8 GEMM {at}",
                coded,
                sizes,
                rivals.grouped(coded=True),
                example=lambda s, device, n=n, k=k: _experts(s["tokens"], n, k, device, True),
            )
            yield _case(
                f"grouped BF16 GEMM {at}",
                plain,
                sizes,
                rivals.grouped(coded=False),
                example=lambda s, device, n=n, k=k: _experts(s["tokens"], n, k, device, False),
            )


def _random(rows: int, columns: int, device: str) -> Tensor:
    import torch

    return torch.randn(rows, columns, dtype=torch.bfloat16, device=device)


def _norm_example(sizes: Mapping[str, int], device: str) -> tuple[Any, ...]:
    return _random(sizes["tokens"], 7168, device), _random(1, 7168, device)[0]


def _coded(tokens: int, n: int, k: int, device: str) -> tuple[Any, ...]:
    """Codes and scales of activations and weights, scales of rows next to each other."""
    import torch

    e4m3 = torch.float8_e4m3fn
    a = _random(tokens, k, device).to(e4m3)
    w = _random(n, k, device).to(e4m3)
    a_scales = torch.rand(-(-k // 128), tokens, device=device).T
    return a, a_scales, w, torch.rand(-(-n // 128), -(-k // 128), device=device)


def _experts(rows: int, n: int, k: int, device: str, coded: bool) -> tuple[Any, ...]:
    """The same for 8 experts with equally many rows."""
    import torch

    offsets = torch.arange(9, dtype=torch.int32, device=device) * (rows // 8)
    w = torch.randn(8, n, k, dtype=torch.bfloat16, device=device)
    if not coded:
        return _random(rows, k, device), w, offsets
    a, a_scales, _, _ = _coded(rows, 128, k, device)
    w_scales = torch.rand(8, -(-n // 128), -(-k // 128), device=device)
    return a, a_scales, w.to(torch.float8_e4m3fn), w_scales, offsets
