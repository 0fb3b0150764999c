"""Long prompts: how much of them one step takes, so that memory stays bounded."""

import pytest
import torch

import dslc
from backends.pytorch import generate as generation

# A maximum over all earlier tokens: 5 numbers for each pair, which no composite op covers.
MODEL = """\
edition 2026
index t : time, s : history t
const width = 5

block Peak[d] {
  param W[d]
  def (x[t,d]) -> y[t,d] {
    cached past[s,d] = W[d] * x[t,d]
    let peak[t,d] = max[s](where(position[s] <= position[t], past[s,d], -inf))
    y[t,d] = x[t,d] + peak[t,d]
  }
}

model Toy {
  index d : width, w : 11
  param embed[w, d]
  use peak = Peak[d]
  def main(token[t] of w) -> logits[t,w] {
    logits[t,w] = embed[w,d] * peak(embed[token[t], d])
  }
}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.arch").write_text(MODEL)
    dslc.compile(folder / "toy.arch").save(folder / "out")
    return dslc.load(folder / "out")


def steps(model, monkeypatch, batch: int, time: int) -> list[tuple[int, int]]:
    """Tokens of a sequence and its history, of every step of a prefill."""
    taken = []
    step = type(model).step

    def counted(self, entry, given, inputs):
        taken.append((given.time, given.history))
        return step(self, entry, given, inputs)

    monkeypatch.setattr(type(model), "step", counted)
    tokens = torch.randint(11, (batch, time), generator=torch.Generator().manual_seed(0))
    model.generate(tokens, max_new_tokens=1)
    return taken


def test_equations_about_pairs_take_fewer_tokens_the_longer_the_history(toy, monkeypatch):
    assert toy.manifest.pairs == 5
    monkeypatch.setattr(generation, "PREFILL_PAIRS", 5 * 2 * 60 * 60)
    taken = steps(toy, monkeypatch, batch=2, time=173)
    assert sum(time for time, _ in taken) == 173 and taken[0] == (60, 60)
    assert all(5 * 2 * time * history <= 5 * 2 * 60 * 60 for time, history in taken[:-1])
    assert [time for time, _ in taken] == sorted((time for time, _ in taken), reverse=True)


def test_a_step_takes_some_tokens_however_long_the_history(toy, monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_PAIRS", 1)
    assert {time for time, _ in steps(toy, monkeypatch, batch=1, time=64)} == {16}


def test_attention_bounds_itself(monkeypatch):
    from small import model

    assert model().manifest.pairs == 0
    monkeypatch.setattr(generation, "PREFILL_PAIRS", 1)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 80)
    assert [time for time, _ in steps(model(), monkeypatch, 2, 99)] == [40, 40, 19]


def test_the_parts_are_the_whole(toy, monkeypatch):
    tokens = torch.randint(11, (3, 50), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([50, 31, 8])
    whole = toy.generate(tokens, lengths, max_new_tokens=4)
    monkeypatch.setattr(generation, "PREFILL_PAIRS", 5 * 3 * 400)
    parts = toy.generate(tokens, lengths, max_new_tokens=4)
    assert [p.tolist() for p in parts] == [w.tolist() for w in whole]
