"""What is left to torch: for shipped models and GPUs, and for a model of a user's own."""

from pathlib import Path

import pytest

from backends.triton.generate import generate
from backends.triton.targets import TARGETS
from dslc.program import compile_file


def generated(file: str, target: str = "sm_90", **choices):
    program = compile_file(file, **choices).compiled.program
    return generate(program, TARGETS[target], "bfloat16")


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("file", "deploy"),
    [("dsv3", "fp8"), ("dsv3", None), ("dsv2", None), ("llama3", None), ("qwen3_moe", None)],
)
def test_nothing_is_left_to_torch(file: str, deploy: str | None, target: str) -> None:
    found = generated(file, target, deploy=deploy)
    assert found.fallbacks == ()
    for operator in found.operators:
        cost = operator.traffic(operator.shown)
        assert cost.bytes <= 1.2 * cost.bound, operator.name


def test_what_is_left_is_told_with_its_place() -> None:
    """An indexer's choice is no interval; its attention is torch's, and so is what makes the mask."""
    found = generated("dsv3_2")
    attentions = [f for f in found.fallbacks if f.op == "attention"]
    assert [(f.place, f.body) for f in attentions] == [
        ("std/mla.arch:64", "MLA.call.few"),
        ("std/mla.arch:64", "MLA.call.many"),
    ]
    assert attentions[0].text.startswith("p[h,t,s] * val[s,h,v]")


OWN = """
const width = 96
const count = 50

block Wave[d] {
  param gain[d], shift[d]

  def call(x[t, d]) -> y {
    let near[t,d] = exp(-x[t,d] * x[t,d] * 0.5)
    y[t,d] = gain[d] * near[t,d] * tanh(x[t,d]) + shift[d]
  }
}

model Own {
  index w : count, d : width
  param embed[w, d]
  use wave = Wave[d]

  def main(token[t] of w) -> logits {
    x[t,d]      = embed[token[t], d]
    h[t,d]      = x[t,d] + wave(x[t,d])
    logits[t,w] = embed[w,d] * h[t,d]
  }
  entry main
}
"""


def test_an_activation_of_ones_own_is_one_kernel(tmp_path: Path) -> None:
    (tmp_path / "own.arch").write_text(OWN)
    found = generated(str(tmp_path / "own.arch"))
    assert found.fallbacks == ()
    (own,) = [o for o in found.operators if "tl.exp" in o.kernels[0].source]
    assert "tl.sigmoid" in own.kernels[0].source  # of tanh
    assert found.model.count(f"kernels.{own.name}(") == 1
