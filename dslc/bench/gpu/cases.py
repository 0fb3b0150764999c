"""What is timed: kernels at the sizes of published models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from backends.triton.families import (
    attention_decode,
    attention_prefill,
    combine,
    dispatch,
    gated,
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
from backends.triton.families.gemm_spec import Gemm
from backends.triton.kernel import Operator
from backends.triton.targets import Target
from dslc.bench.gpu import published, rivals
from dslc.bench.gpu.published import Published

Example = Callable[[Mapping[str, int], str], tuple[Any, ...]]

ROWS = Quantised("float8_e4m3fn", "float32", 1, 128)
BLOCKS = Quantised("float8_e4m3fn", "float32", 128, 128)
SCALE = 0.1352337788608801  # of the published latent attention


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


@dataclass(frozen=True)
class Shapes:
    """The sizes of all cases.

    Attributes:
        tokens: few and many; sequences: as many draw their next token at once.
        turned: heads, numbers of a head, and which of them are turned (the last).
        groups, open: of experts, of which each token takes ``picks``.
        prompt: tokens of the sequence that prefill attends to; history: positions when decoding.
        latent: heads and dims of latent attention: without and with position, of values, absorbed.
        grouped: heads, heads of keys, dim.
        gemm: (n, k): tokens; experts_gemm: experts of one product, (n, k), rows.
    """

    width: int = 7168
    vocab: int = 129280
    tokens: tuple[int, ...] = (128, 4096)
    sequences: tuple[int, ...] = (1, 128)
    turned: tuple[int, int, int] = (128, 192, 64)
    experts: int = 256
    groups: int = 8
    open: int = 4
    picks: int = 8
    prompt: int = 4096
    history: int = 4096
    decoding: tuple[int, ...] = tuple(published.DECODE)
    latent: tuple[int, int, int, int, int] = (128, 128, 64, 128, 512)
    grouped: tuple[int, int, int] = (32, 8, 128)
    gemm: Mapping[tuple[int, int], Iterable[int]] = field(default_factory=lambda: published.GEMM)
    experts_gemm: tuple[int, tuple[tuple[int, int], ...], tuple[int, ...]] = (
        8,
        ((4096, 7168), (7168, 2048)),
        (512, 32768),
    )


PUBLISHED = Shapes()
# Everything once, in seconds, in Triton's interpreter.
TINY = Shapes(
    width=256,
    vocab=500,
    tokens=(3,),
    sequences=(2,),
    turned=(2, 24, 8),
    experts=16,
    groups=4,
    open=2,
    picks=2,
    prompt=20,
    history=64,
    decoding=(2,),
    latent=(4, 32, 16, 32, 64),
    grouped=(4, 2, 32),
    gemm={(256, 256): (3,)},
    experts_gemm=(2, ((256, 128),), (5,)),
)


def cases(target: Target, shapes: Shapes = PUBLISHED) -> Iterator[Case]:
    """All of them, the quick ones first."""
    yield from _small(target, shapes)
    yield from _routing(target, shapes)
    yield from _attention(target, shapes)
    yield from _products(target, shapes)


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


def _small(target: Target, shapes: Shapes) -> Iterator[Case]:
    width = shapes.width
    heads, dim, turning = shapes.turned
    for tokens in shapes.tokens:
        at, sizes = f"{tokens:,} tokens", {"tokens": tokens}
        spec = rms_norm.RMSNorm(width, 1e-6)
        plain = rms_norm.generate(spec, target)
        yield _case(f"RMSNorm {width}, {at}", plain, sizes, rivals.norm(width, 1e-6))
        summed = rms_norm.generate(replace(spec, residual=True), target)
        others = rivals.norm_of_a_sum(width, 1e-6)
        yield _case(f"RMSNorm {width} of a sum, {at}", summed, sizes, others)
        if target.fp8:
            normed = rms_norm.generate(replace(spec, to=ROWS), target)
            others = rivals.norm_in_codes(width, 1e-6, 128)
            yield _case(f"RMSNorm {width} in FP8, {at}", normed, sizes, others, near=None)
            codes = quantise.generate(quantise.Quantise(width, ROWS), target)
            others = rivals.quantise(128)
            yield _case(f"quantise {width} to FP8, {at}", codes, sizes, others, near=None)
            both = gated.generate(gated.Gated(width, to=ROWS), target)
            others = rivals.gated_in_codes(128)
            yield _case(f"SwiGLU {width} in FP8, {at}", both, sizes, others, near=None)
        own = rotary.RotarySpec(heads, turning, False, heads * dim, dim)
        turned = rotary.generate(own, target)
        yield _case(f"rotary {heads} x {turning}, {at}", turned, sizes, rivals.rotary(False))
    for sequences in shapes.sequences:
        at, sizes = f"{sequences} sequences", {"sequences": sequences}
        of = f"of {shapes.vocab:,}, {at}"
        greedy = sampling.generate(sampling.SamplingSpec(shapes.vocab, greedy=True), target)
        yield _case(f"greedy token {of}", greedy, sizes, rivals.greedy(), near=0)
        drawn = sampling.generate(sampling.SamplingSpec(shapes.vocab), target)
        yield _case(f"drawn token {of}", drawn, sizes, rivals.drawn(), near=None)


def _routing(target: Target, shapes: Shapes) -> Iterator[Case]:
    experts, picks, width = shapes.experts, shapes.picks, shapes.width
    spec = router.RouterSpec(
        experts,
        picks,
        "sigmoid",
        True,
        shapes.groups,
        shapes.open,
        2,
        normalise=True,
        eps=1e-20,
        scale=2.5,
    )
    for tokens in shapes.tokens:
        at, sizes = f"{tokens:,} tokens", {"tokens": tokens}
        yield _case(
            f"router {picks} of {experts}, {at}",
            router.generate(spec, target),
            sizes,
            rivals.router(spec),
            near=None,
        )
        yield _case(
            f"dispatch {picks} of {experts} x {width}, {at}",
            dispatch.generate(dispatch.DispatchSpec(experts, picks, width), target),
            sizes,
            rivals.dispatch(experts),
        )
        yield _case(
            f"combine {picks} x {width}, {at}",
            combine.generate(combine.CombineSpec(picks, width, 1), target),
            sizes,
            rivals.combine(),
        )


# Latent attention with keys and values of each head, as prompts take it, and absorbed, as decoding
# does; and grouped-query attention.
def latent_prefill(shapes: Shapes) -> AttentionSpec:
    heads, own, turned, value, _ = shapes.latent
    both, held = own + turned, own + value
    return AttentionSpec(
        heads,
        (
            Term("n", Rows(heads, own, heads * both, both), Rows(heads, own, heads * held, held)),
            Term("r", Rows(heads, turned), Rows(1, turned)),
        ),
        Rows(heads, value, heads * held, held),
        SCALE,
    )


def latent_decode(shapes: Shapes) -> AttentionSpec:
    heads, _, turned, _, latent = shapes.latent
    return AttentionSpec(
        heads,
        (
            Term("c", Rows(heads, latent), Rows(1, latent, paged=True)),
            Term("r", Rows(heads, turned), Rows(1, turned, paged=True)),
        ),
        0,
        SCALE,
    )


def grouped(shapes: Shapes, paged: bool) -> AttentionSpec:
    heads, shared, dim = shapes.grouped
    held = Rows(shared, dim, paged=paged)
    return AttentionSpec(heads, (Term("n", Rows(heads, dim), held),), held, dim**-0.5)


def _attention(target: Target, shapes: Shapes) -> Iterator[Case]:
    heads, own, turned, value, latent = shapes.latent
    of_latent, of_grouped = str(heads), "{}/{} x {}".format(*shapes.grouped)
    for name, spec, figure in (
        (
            f"latent prefill attention {of_latent} x {own + turned}/{value}",
            latent_prefill(shapes),
            published.prefill() if shapes is PUBLISHED else None,
        ),
        (f"grouped prefill attention {of_grouped}", grouped(shapes, paged=False), None),
    ):
        operator = attention_prefill.generate(spec, target)
        sizes = {"tokens": shapes.prompt, "history": shapes.prompt, "sequences": 1}
        others = rivals.prefill(spec)
        yield _case(f"{name}, {shapes.prompt:,} tokens", operator, sizes, others, published=figure)
    absorbed = latent_decode(shapes)
    for name, spec in (
        (f"latent decode attention {of_latent} x {latent + turned}/{latent}", absorbed),
        (f"grouped decode attention {of_grouped}", grouped(shapes, paged=True)),
    ):
        operator = attention_decode.generate(spec, target)
        for count in shapes.decoding:
            sizes = {"tokens": count, "history": shapes.history, "sequences": count}
            figure = published.decode(count) if spec is absorbed and shapes is PUBLISHED else None
            at = f"{count} x {shapes.history:,}"
            others = rivals.decode(spec)
            yield _case(f"{name}, {at}", operator, sizes, others, published=figure)


def _products(target: Target, shapes: Shapes) -> Iterator[Case]:
    for (n, k), counts in shapes.gemm.items():
        plain = gemm.generate(Gemm(n, k), target)
        of_codes = Gemm(n, k, weights=BLOCKS, activations=ROWS)
        coded = gemm.generate(of_codes, target) if target.fp8 else None
        for tokens in counts:
            at, sizes = f"{n} x {k}, {tokens:,} tokens", {"tokens": tokens}
            if coded is not None:
                figure = published.gemm(n, k, tokens)
                others = rivals.gemm()
                yield _case(f"FP8 GEMM {at}", coded, sizes, others, published=figure)
            yield _case(f"BF16 GEMM {at}", plain, sizes, rivals.plain_gemm())
    experts, matrices, counts = shapes.experts_gemm
    for n, k in matrices:
        spec = grouped_gemm.GroupedGemm(experts, n, k)
        whole = replace(spec, weights=BLOCKS, activations=ROWS)
        coded = grouped_gemm.generate(whole, target) if target.fp8 else None
        plain = grouped_gemm.generate(spec, target)
        for rows in counts:
            at, sizes = f"{experts} x {n} x {k}, {rows:,} rows", {"tokens": rows}
            if coded is not None:
                yield _case(f"grouped FP8 GEMM {at}", coded, sizes, rivals.grouped(coded=True))
            yield _case(f"grouped BF16 GEMM {at}", plain, sizes, rivals.grouped(coded=False))
