"""Models compiled for a GPU, interpreted, against the same models compiled for the CPU."""

import os
from pathlib import Path

import pytest
import torch
from own_model import OWN

import dslc
from backends.triton.sampler import Sampler
from dslc.program import Program, compile_file

QUIET = {"note": lambda sentence: None}
ON_GPU = os.environ.get("TRITON_INTERPRET") == "0"  # as make gpu runs these
PLACES = {"cpu": "cpu", "sm_90": "cuda" if ON_GPU else "cpu"}


@pytest.fixture(autouse=True)
def nothing_ahead(monkeypatch) -> None:
    """The interpreter takes no binaries."""
    monkeypatch.setattr(Program, "binaries", lambda self, progress=None: [])


def both(folder: Path, file: str, dtype: str, **choices):
    """One model twice, weights and dtype the same: on the CPU, and with a GPU's kernels."""
    models = []
    for target, device in PLACES.items():
        program = compile_file(file, target=target, dtype=dtype, **choices)
        program.save(folder / target)
        models.append(dslc.load(folder / target, device=device, dtype=dtype, seed=1, **QUIET))
    return models


TOKENS = torch.randint(0, 500, (2, 7), generator=torch.manual_seed(0), device="cpu")
LENGTHS = torch.tensor([7, 4], device="cpu")


def logits(model, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Of all tokens that are there, one row each."""
    with torch.inference_mode():
        found = model(tokens, lengths=LENGTHS).float().cpu()
    return torch.cat([row[:length] for row, length in zip(found, LENGTHS, strict=True)])


def away(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


# float32 first: there nothing hides, but products are left to torch, as tensor cores would round.
@pytest.mark.parametrize(
    ("file", "dtype", "near"),
    [
        ("dsv3", "float32", 2e-5),
        ("dsv3", "bfloat16", 3e-2),
        ("mixtral", "bfloat16", 3e-2),
        ("qwen3_moe", "float32", 2e-5),  # norms of heads
        ("qwen3_next", "float32", 2e-5),  # a part of each head is turned; much is left to torch
    ],
)
def test_logits_agree(file: str, dtype: str, near: float, tmp_path: Path) -> None:
    plain, gpu = both(tmp_path, file, dtype, dims="small")
    assert away(logits(gpu), logits(plain)) <= near


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_model_of_ones_own(dtype: str, near: float, tmp_path: Path) -> None:
    file = tmp_path / "own.arch"
    file.write_text(OWN)
    plain, gpu = both(tmp_path, str(file), dtype)
    tokens = TOKENS % 50
    assert away(logits(gpu, tokens), logits(plain, tokens)) <= near


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_caps_and_sinks_are_within_kernels(name: str, tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "oracle" / f"{name}.arch"
    small = {"layers": 2, "hidden": 48, "head_dim": 16}
    plain, gpu = both(tmp_path, str(file), "float32", dims="tiny", set=small)
    text = (tmp_path / "sm_90" / "model.py").read_text()
    assert "prefill_attention" in text and "decode_attention" in text
    tokens = TOKENS % 50
    assert away(logits(gpu, tokens), logits(plain, tokens)) <= 1e-5
    new = [m.generate(tokens, lengths=LENGTHS, max_new_tokens=2) for m in (plain, gpu)]
    assert all(torch.equal(a, b) for a, b in zip(*new, strict=True))


def test_quantised_model_is_as_near_as_on_the_cpu(tmp_path: Path) -> None:
    """Codes near a boundary fall either way, and routing with them, so both are held against the
    model that is not quantised."""
    plain, gpu = both(tmp_path, "dsv3", "bfloat16", dims="small", deploy="fp8")
    compile_file("dsv3", dims="small").save(tmp_path / "exact")
    exact = logits(dslc.load(tmp_path / "exact", dtype="float32", seed=1, **QUIET))
    assert away(logits(gpu), exact) <= 1.3 * away(logits(plain), exact)


def test_generates_from_pages_as_the_cpu_does(tmp_path: Path) -> None:
    """Prompts of two lengths, one in two parts, then token by token; float32, so tokens agree."""
    plain, gpu = both(tmp_path, "dsv3", "float32", dims="small", set={"layers": 2, "dense": 1})
    tokens = [m.generate(TOKENS, lengths=LENGTHS, max_new_tokens=3) for m in (plain, gpu)]
    assert all(torch.equal(a, b) for a, b in zip(*tokens, strict=True))
    # The next tokens come from kernels too, and are drawn from the same numbers.
    assert isinstance(gpu.choose, Sampler) and not isinstance(plain.choose, Sampler)
    drawn = [
        m.generate(TOKENS, max_new_tokens=3, temperature=0.9, top_p=0.9, min_p=0.01, seed=5)
        for m in (plain, gpu)
    ]
    assert torch.equal(*drawn)
    caches = [m.new_cache(2, capacity=70) for m in (plain, gpu)]
    for part in (TOKENS[:, :5], TOKENS[:, 5:], TOKENS[:, :1]):
        found = [
            m(part, cache=cache).detach().cpu()
            for m, cache in zip((plain, gpu), caches, strict=True)
        ]
        assert away(found[1], found[0]) < 2e-5


def test_logits_that_are_no_numbers_are_refused_as_on_the_cpu(tmp_path: Path) -> None:
    plain, gpu = both(tmp_path, "dsv3", "float32", dims="small", set={"layers": 1, "dense": 1})
    said = []
    for model in (plain, gpu):
        with torch.no_grad():
            model.module.head.fill_(float("nan"))
        with pytest.raises(dslc.UserError) as refused:
            model.generate(TOKENS, max_new_tokens=2)
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert said[0].startswith("the logits of sequence 0 are NaN after 0 new tokens")


def test_what_is_no_number_stays_in_its_sequence(tmp_path: Path) -> None:
    """Through norms, codes, routing, experts and attention, prompts and then tokens: a sequence
    that holds such a value is NaN behind it, and another one is what it was."""
    program = compile_file(
        "dsv3",
        target="sm_90",
        dims="small",
        set={"layers": 2, "dense": 1},
        deploy="fp8",
    )
    program.save(tmp_path / "model")
    model = dslc.load(tmp_path / "model", device=PLACES["sm_90"], dtype="bfloat16", seed=1, **QUIET)
    poisoned = torch.tensor([[5, 6, 7, 8], [5, 6, 900, 8]], device="cpu")

    def run() -> list[torch.Tensor]:
        cache = model.new_cache(2, capacity=8)
        with torch.inference_mode():
            return [
                model(tokens, cache=cache).float().cpu() for tokens in (poisoned, poisoned[:, :1])
            ]

    clean = run()
    with torch.no_grad():
        model.module.embed[900, 3] = float("nan")
    for found, before in zip(run(), clean, strict=True):
        assert torch.equal(found[0], before[0])
        assert found[1, -1].isnan().all()
