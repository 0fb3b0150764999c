"""A block may take float32: what it keeps of a residual stream, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import torch

import dslc
from tests.differential import agree

STREAM = """
edition 2026
import std.norm
index t : time
block Step[d] {
  index f : 7
  param up[f, d]
  param down[d, f]
  param little[d]
  use norm = RMSNorm[d]
  def (x[t,d]: f32) -> y[t,d]: f32 {
    n[t,d]      = norm(x[t,d])
    let u[t,f]  = tanh(up[f,d] * n[t,d])
    h[t,d]: f32 = x[t,d] + down[d,f] * u[t,f]
    y[t,d]      = h[t,d] + little[d]
  }
}
model Own {
  index d : 6, w : 11, l : 64
  param embed[w, d]
  use step[l] = Step[d]
  def main(token[t] of w) -> logits[t,w] {
    x[t,d]      = chain[l](step, embed[token[t], d])
    logits[t,w] = embed[w,d] * x[t,d]
  }
}
"""


def test_a_stream_in_float32_computes_the_same_however_it_is_run(tmp_path: Path) -> None:
    agree(tmp_path, STREAM.replace("l : 64", "l : 3"))


def test_what_bfloat16_would_lose_is_kept(tmp_path: Path) -> None:
    """64 times 1/1024 beside 1: one is less than half of bfloat16's step, all are eight steps."""
    results = []
    for text in (STREAM, STREAM.replace("x[t,d]: f32", "x[t,d]").replace(": f32 {", " {")):
        (tmp_path / "own.arch").write_text(text)
        dslc.compile(tmp_path / "own.arch").save(tmp_path / "built")
        model = dslc.load(tmp_path / "built", dtype="bfloat16", seed=0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.fill_(0 if "down" in name else 2**-10 if "little" in name else 1)
            results.append(model(torch.tensor([[3]])).unique().item())
    assert results == [6 * (1 + 64 / 1024), 6.0]
