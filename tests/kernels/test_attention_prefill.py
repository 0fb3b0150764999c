"""Prefill attention: ragged batches, chunks of prompts, windows, shared heads and odd dims."""

from dataclasses import replace

import pytest
import torch
from attention_cases import CAPPED, Case, heads_of, two_terms
from running_kernels import compiles, load

from backends.triton.families.attention import AttentionSpec, Rows, Term, chunks
from backends.triton.families.attention_prefill import candidates, generate, traffic
from backends.triton.targets import GFX942, SM_90, SM_100

# One token; a prompt; chunks of prompts, whose queries start within the history; no queries at all.
RAGGED = [(1, 1), (37, 37), (5, 70), (0, 4), (1, 33), (66, 130)]

# The sizes of a published model of 671B parameters, and of two of 8B and 72B.
PUBLISHED = AttentionSpec(
    heads=128,
    terms=(
        Term("n", Rows(128, 128, 128 * 192, 192), Rows(128, 128, 128 * 256, 256)),
        Term("r", Rows(128, 64), Rows(1, 64, paged=True)),
    ),
    value=Rows(128, 128, 128 * 256, 256),
    scale=0.1352337788608801,
)
OF_8B = heads_of(32, 8, 128, paged=True)
OF_72B = heads_of(64, 8, 128, visible=(0, 4096))


def check(spec: AttentionSpec, lengths=RAGGED, near: float = 2e-6, small: bool = False) -> None:
    operator = generate(spec, SM_90)
    if small:  # tiles of 16, so that few tokens make several tiles
        kernel = operator.kernels[0]
        config = replace(kernel.configs[0], constants={"BLOCK_M": 16, "BLOCK_N": 16})
        operator = replace(operator, kernels=(replace(kernel, configs=(config,)),))
    case = Case.random(spec, lengths)
    with load(operator) as kernels:
        got = case.run(kernels, operator)
    want = case.expected()
    assert got.shape == want.shape and str(got.dtype) == f"torch.{spec.dtype}"
    torch.testing.assert_close(got.float(), want, rtol=near, atol=near)


@pytest.mark.parametrize("visible", [(0, None), (0, 7), (0, 64), (1, None), (3, 20), None])
@pytest.mark.parametrize("small", [True, False], ids=["tiles of 16", "as tuned"])
def test_what_a_token_sees(visible, small) -> None:
    check(heads_of(2, 1, 16, visible=visible, dtype="float32"), small=small)


@pytest.mark.parametrize("visible", [(0, None), (1, 9), None])
@pytest.mark.parametrize(
    "more", [{"score": CAPPED}, {"sink": "float32"}, {"score": CAPPED, "sink": "float32"}]
)
def test_caps_and_sinks(visible, more) -> None:
    check(heads_of(4, 2, 16, visible=visible, dtype="float32", **more), small=True)


def test_a_sink_in_bfloat16() -> None:
    check(heads_of(4, 2, 16, dtype="bfloat16", score=CAPPED, sink="bfloat16"), near=2e-2)


@pytest.mark.parametrize("dims", [(16, 16, 16), (24, 8, 20), (128, 64, 128), (100, 4, 80)])
def test_keys_of_each_head_beside_shared_ones(dims) -> None:
    check(two_terms(3, *dims, dtype="float32"), [(33, 33), (2, 19)])


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("page", [16, 24])
def test_pages(heads, kv, page) -> None:
    check(heads_of(heads, kv, 16, 40, paged=True, page=page, dtype="float32"), small=True)


def test_some_keys_in_pages_and_some_packed() -> None:
    check(two_terms(2, 32, 16, 32, paged=True, dtype="float32"), small=True)


def test_strides_of_wider_tensors() -> None:
    """Parts of one projection: a head's 24 numbers are 16 of one term and 8 of another."""
    spec = two_terms(2, 16, 8, 16, dtype="float32")
    case = Case.random(spec, [(9, 9)])
    want = case.expected()
    joined = torch.cat(case.queries, -1)
    terms = (
        replace(spec.terms[0], query=Rows(2, 16, 48, 24)),
        replace(spec.terms[1], query=Rows(2, 8, 48, 24)),
    )
    case.spec, case.queries = replace(spec, terms=terms), [joined[..., :16], joined[..., 16:]]
    operator = generate(case.spec, SM_90)
    with load(operator) as kernels:
        got = case.run(kernels, operator)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_bfloat16() -> None:
    check(heads_of(2, 1, 64), near=2e-2)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_sequence(number) -> None:
    spec = heads_of(1, 1, 16, dtype="float32")
    case = Case.random(spec, [(5, 5), (40, 40)])
    case.keys[0][2] = number
    operator = generate(spec, SM_90)
    with load(operator) as kernels:
        got = case.run(kernels, operator)
    assert not got[2:5].isfinite().all() and not got[2].isfinite().any()
    torch.testing.assert_close(got[5:], case.expected()[5:], rtol=2e-6, atol=2e-6)


def test_no_queries_at_all() -> None:
    check(heads_of(2, 1, 16, dtype="float32"), [(0, 3), (0, 0)])


@pytest.mark.parametrize("dim", [*range(1, 130), 192, 256, 576])
def test_head_dims_are_covered_by_few_tiles(dim) -> None:
    parts = chunks(dim)
    assert sum(part.valid for part in parts) == dim and len(parts) <= 2
    assert all(part.width >= max(part.valid, 16) for part in parts)
    assert all(part.width & (part.width - 1) == 0 for part in parts)


@pytest.mark.parametrize("target", [SM_90, SM_100], ids=lambda t: t.name)
def test_published_and_odd_sizes_compile(target) -> None:
    specs = [PUBLISHED, OF_8B, heads_of(32, 8, 96, paged=True), two_terms(16, 64, 32, 64)]
    binaries = compiles(*(generate(spec, target) for spec in specs), target=target)
    if target is SM_90:
        assert all(binary.config.constants["BLOCK_M"] >= 64 for binary in binaries)


def test_compiles_for_amd() -> None:
    from backends.triton.ahead import compile_ahead

    for spec in (PUBLISHED, OF_8B):
        kernel = generate(spec, GFX942).kernels[0]
        assert compile_ahead([(kernel, kernel.configs[0])], GFX942)


@pytest.mark.parametrize("spec", [PUBLISHED, OF_8B, OF_72B], ids=["671B", "8B", "72B"])
@pytest.mark.parametrize("tokens", [1, 100, 4096, 16384])
def test_bytes_are_near_the_bound(spec, tokens) -> None:
    config = generate(spec, SM_90).kernels[0].configs[0]
    cost = traffic(spec, {"tokens": tokens, "history": 4096, "sequences": 1}, config)
    assert cost.bound <= cost.bytes <= 1.2 * cost.bound


def test_candidates_begin_with_what_is_used_and_have_no_double() -> None:
    found = [config.text() for config in candidates(PUBLISHED, SM_90)]
    assert found[0] == generate(PUBLISHED, SM_90).kernels[0].configs[0].text()
    assert len(found) == len(set(found)) > 5
