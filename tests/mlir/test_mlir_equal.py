"""One compiled module for each architecture gives what the PyTorch backend gives: any batch, any
lengths, prefill in one step or in several, decoding of one sequence and of many."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dslc
from backends.mlir.model import load
from backends.pytorch.asked import InputError
from mlir.compiled import ODD, difference, model, reference

pytest.importorskip("iree.compiler")
pytest.importorskip("iree.runtime")

SAME = 1e-5


def tokens(name: str, batch: int, time: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, ODD[name]["vocab"], (batch, time))


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("lengths", [(1,), (7,), (5, 3, 1), (33, 12)])
def test_logits(name: str, lengths: tuple[int, ...]) -> None:
    given = tokens(name, len(lengths), max(lengths))
    with torch.no_grad():
        expected = reference(name)(torch.tensor(given), torch.tensor(lengths)).numpy()
    found = model(name)(given, lengths)
    for row, length in enumerate(lengths):
        assert difference(found[row, :length], expected[row, :length]) <= SAME


@pytest.mark.parametrize("name", ODD)
def test_steps(name: str) -> None:
    """A ragged first step, a second one that a sequence sits out, then token by token."""
    ours, torchs = model(name), reference(name)
    mine, theirs = ours.new_cache(3, 40), torchs.new_cache(3)
    for step, counts in enumerate([(6, 2, 4), (3, 0, 1), (1, 1, 1), (1, 1, 1)]):
        given = tokens(name, 3, max(counts), seed=step)
        found = ours(given, counts, mine)
        with torch.no_grad():
            expected = torchs(torch.tensor(given), torch.tensor(counts), cache=theirs).numpy()
        for row, count in enumerate(counts):
            if count:
                assert difference(found[row, :count], expected[row, :count]) <= SAME


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("chunk", [None, 3])
def test_greedy_tokens(name: str, chunk: int | None) -> None:
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]
    for batch in (prompts[:1], prompts):
        found = model(name).generate(batch, max_new_tokens=6, prefill_chunk=chunk)
        longest = max(map(len, batch))
        padded = torch.tensor([p + [0] * (longest - len(p)) for p in batch])
        lengths = torch.tensor([len(p) for p in batch])
        expected = reference(name).generate(padded, lengths, max_new_tokens=6)
        assert found == [row.tolist() for row in expected]


BIGRAM = """edition 2026
model Bigram {
  index t : time, w : 11, d : 5
  param embed[w, d]
  param head[w, d]
  def main(token[t] of w) -> logits[t,w] {
    logits[t,w] = head[w,d] * embed[token[t], d]
  }
}
"""


def test_a_model_that_caches_nothing(tmp_path: Path) -> None:
    (tmp_path / "bigram.arch").write_text(BIGRAM)
    for backend in ("mlir", "pytorch"):
        dslc.compile(tmp_path / "bigram.arch", backend=backend).save(tmp_path / backend)
    ours, theirs = load(tmp_path / "mlir", seed=0), dslc.load(tmp_path / "pytorch", seed=0)
    given = torch.tensor([[1, 2, 10]])
    with torch.no_grad():
        assert difference(ours(given.numpy()), theirs(given).numpy()) <= SAME
    found = ours.generate([[1, 2]], max_new_tokens=3)
    assert found == theirs.generate(given[:, :2], max_new_tokens=3).tolist()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_tokens_give_no_logits(shape: tuple[int, int]) -> None:
    found = model("llama3")(np.zeros(shape, np.int64))
    assert found.shape == (*shape, ODD["llama3"]["vocab"])
    assert model("llama3").generate([]) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prefill_chunk": 0}, "prefill_chunk is 0: it must be at least 1"),
        ({"prefill_chunk": -1}, "prefill_chunk is -1: it must be at least 1"),
        ({"prompts": [[]]}, "a prompt needs at least one token"),
        ({"prompts": [[61]]}, "'token' 61 is not one of 0 .. 60"),
        (
            {"max_new_tokens": 200_000},
            "a prompt of 1 and 200,000 new tokens are 200,001 positions; the model is made for "
            "131,072 (require history <= context_length, std/rotary.arch:23)",
        ),
    ],
)
def test_what_cannot_be_generated(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        model("llama3").generate(**{"prompts": [[1]], **arguments})
    assert str(error.value) == message


def test_bfloat16() -> None:
    """As far from the fp32 logits as the PyTorch backend's bfloat16 is, or nearer."""
    name, errors = "llama3", []
    for seed in range(5):
        given = torch.tensor(tokens(name, 2, 9, seed))
        with torch.no_grad():
            exact = reference(name)(given).numpy()
            theirs = difference(reference(name, "bfloat16")(given).float().numpy(), exact)
        ours = difference(model(name, "bfloat16")(given.numpy()), exact)
        errors.append(ours / theirs)
    assert np.median(errors) <= 1.2


def test_decoding_reads_what_was_put_into_the_cache_in_place() -> None:
    """The caches that a step returns are those that it was given, not copies."""
    ours = model("dsv3")
    cache = ours.new_cache(1, 16)
    ours(tokens("dsv3", 1, 5), cache=cache)
    before = cache.arrays[0]
    ours(tokens("dsv3", 1, 1), cache=cache)
    held, now = (np.asarray(a.to_host()) for a in (before, cache.arrays[0]))
    assert np.array_equal(held, now)
    rows = np.abs(now).sum((0, 1, 3)) > 0
    assert rows.tolist() == [True] * 6 + [False] * 10
