"""Decode attention: one query a sequence or a few, histories in pages, split and added up."""

from dataclasses import replace

import pytest
import torch
from attention_cases import CAPPED, Case, heads_of, latent
from running_kernels import compiles, load

from backends.triton.ahead import compile_ahead
from backends.triton.families.attention import AttentionSpec
from backends.triton.families.attention_decode import candidates, generate, splits, traffic
from backends.triton.targets import GFX942, SM_90, SM_100

LENGTHS = [(1, 1), (1, 40), (1, 130), (0, 7), (1, 64)]

# The latent attention of a published model of 671B parameters; grouped ones of 8B, 72B and 405B.
PUBLISHED = replace(latent(128, 512, 64), scale=0.1352337788608801)
OF_8B = heads_of(32, 8, 128, paged=True)
OF_72B = heads_of(64, 8, 128, paged=True, visible=(0, 4096))
OF_405B = heads_of(128, 8, 128, paged=True)
SPECS = [PUBLISHED, OF_8B, OF_72B, OF_405B]
NAMES = ["671B", "8B", "72B", "405B"]


def check(
    spec: AttentionSpec,
    parts: int | None = None,
    lengths=LENGTHS,
    near: float = 2e-6,
    block: int = 16,
) -> None:
    operator = generate(spec, SM_90)
    kernel, reduction = operator.kernels
    config = replace(kernel.configs[0], constants={"BLOCK_M": 16, "BLOCK_N": block})
    operator = replace(operator, kernels=(replace(kernel, configs=(config,)), reduction))
    case = Case.random(spec, lengths)
    with load(operator) as kernels:
        got = case.run(kernels, operator, splits=parts)
    want = case.expected()
    assert got.shape == want.shape and str(got.dtype) == f"torch.{spec.dtype}"
    torch.testing.assert_close(got.float(), want, rtol=near, atol=near)


@pytest.mark.parametrize("parts", [None, 1, 3, 8])
@pytest.mark.parametrize("page", [16, 24])
def test_latent_attention(parts, page) -> None:
    check(latent(20, 48, 8, page=page, dtype="float32"), parts)


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2), (40, 2), (5, 1)])
@pytest.mark.parametrize("parts", [1, 4])
def test_grouped_heads(heads, kv, parts) -> None:
    check(heads_of(heads, kv, 16, 24, paged=True, dtype="float32"), parts, LENGTHS[:3])


@pytest.mark.parametrize("visible", [(0, None), (0, 5), (0, 50), (1, None), (2, 30), None])
@pytest.mark.parametrize("parts", [1, 3])
def test_what_a_token_sees(visible, parts) -> None:
    check(heads_of(2, 1, 16, paged=True, visible=visible, dtype="float32"), parts)


@pytest.mark.parametrize("visible", [(0, None), (2, 30)])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("more", [{"sink": "float32"}, {"score": CAPPED, "sink": "float32"}])
def test_caps_and_sinks(visible, parts, more) -> None:
    spec = heads_of(6, 2, 16, paged=True, visible=visible, dtype="float32", **more)
    check(spec, parts, [(1, 1), (1, 40), (2, 130), (0, 7)])


@pytest.mark.parametrize("parts", [1, 3])
def test_several_queries_of_a_sequence(parts) -> None:
    """A token and two guesses: each sees itself and what is before it."""
    check(latent(6, 32, 16, dtype="float32"), parts, [(3, 40), (1, 9), (3, 3), (2, 65)])


@pytest.mark.parametrize("parts", [1, 2])
def test_histories_without_pages(parts) -> None:
    check(latent(4, 32, 16, paged=False, dtype="float32"), parts)


def test_tiles_longer_than_pages() -> None:
    check(latent(4, 32, 16, page=16, dtype="float32"), 2, block=64)


def test_bfloat16() -> None:
    check(latent(16, 64, 32), 2, near=2e-2)


def test_no_number_stays_in_its_sequence() -> None:
    spec = latent(2, 16, 16, dtype="float32")
    case = Case.random(spec, [(1, 40), (1, 40)])
    case.keys[0][3] = float("nan")
    operator = generate(spec, SM_90)
    with load(operator) as kernels:
        got = case.run(kernels, operator, splits=3)
    assert got[0].isnan().all()
    torch.testing.assert_close(got[1:], case.expected()[1:], rtol=2e-6, atol=2e-6)


def test_more_splits_than_tiles_and_no_history() -> None:
    check(latent(2, 16, 16, dtype="float32"), 64, [(1, 1), (1, 20), (0, 0)])


@pytest.mark.parametrize(
    ("sequences", "history", "count"),
    [
        (1, 4096, 16),  # as many as its length is worth
        (1, 100_000, 64),  # 128 programs of 132 processors
        (32, 4096, 2),
        (64, 4096, 1),  # 97% of a wave
        (128, 4096, 1),
        (100, 4096, 3),  # 600 programs in five waves rather than 200 in two
        (100, 1000, 1),  # there the partial sums cost more than the idle processors
        (1, 1, 1),
    ],
)
def test_splits_fill_the_processors(sequences, history, count) -> None:
    assert splits(PUBLISHED, 2 * sequences, history) == count


def test_the_launcher_splits_as_the_model_says() -> None:
    """The text of the launcher has the rule of ``splits`` written out."""
    operator = generate(PUBLISHED, SM_90)
    with load(operator) as kernels:
        seen = []
        setattr(kernels, operator.kernels[0].name, Recorder(seen))
        setattr(kernels, operator.kernels[1].name, Recorder([]))
        for sequences in (1, 32, 64, 100, 128):
            meta = dict(device="meta", dtype=torch.bfloat16)
            getattr(kernels, operator.name)(
                torch.empty(sequences, 128, 512, **meta),
                *[torch.empty(1, **meta)] * 4,
                torch.empty(sequences, **meta),
                torch.empty(sequences, 64, **meta),
                1,
            )
            assert seen.pop() == (2, splits(PUBLISHED, 2 * sequences, 64 * 64), sequences)


class Recorder:
    """Stands for a kernel: notes the grids it is launched with."""

    def __init__(self, grids: list):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


@pytest.mark.parametrize("target", [SM_90, SM_100], ids=lambda t: t.name)
def test_published_and_odd_sizes_compile(target) -> None:
    specs = [PUBLISHED, OF_8B, latent(32, 512, 64), heads_of(32, 32, 80, paged=True)]
    binaries = compiles(*(generate(spec, target) for spec in specs), target=target)
    if target is SM_90:
        first = binaries[0]
        assert first.config.constants["BLOCK_M"] == 64 and first.products["HGMMA"] > 0


def test_compiles_for_amd() -> None:
    jobs = [
        (k, k.configs[0]) for spec in (PUBLISHED, OF_8B) for k in generate(spec, GFX942).kernels
    ]
    assert len(compile_ahead(jobs, GFX942)) == 4


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize("sequences", [1, 16, 32, 64, 100, 128])
def test_bytes_are_near_the_bound(spec, sequences) -> None:
    config = generate(spec, SM_90).kernels[0].configs[0]
    sizes = {"tokens": sequences, "history": 4096, "sequences": sequences}
    cost = traffic(spec, sizes, config)
    assert cost.bound <= cost.bytes <= 1.2 * cost.bound


def test_candidates_begin_with_what_is_used_and_have_no_double() -> None:
    for spec in SPECS:
        found = [config.text() for config in candidates(spec, SM_90)]
        assert found[0] == generate(spec, SM_90).kernels[0].configs[0].text()
        assert len(found) == len(set(found)) > 5
