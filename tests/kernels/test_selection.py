"""What is left to torch: for shipped models and GPUs, and for a model of a user's own."""

from pathlib import Path

import pytest
from own_model import OWN

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
    """An indexer's choice is no interval: its attention is torch's, and what makes the mask."""
    found = generated("dsv3_2")
    attentions = [f for f in found.fallbacks if f.op == "attention"]
    assert [(f.place, f.body) for f in attentions] == [
        ("std/mla.arch:64", "MLA.call.few"),
        ("std/mla.arch:64", "MLA.call.many"),
    ]
    assert attentions[0].text.startswith("p[h,t,s] * val[s,h,v]")


def test_an_activation_and_a_norm_of_ones_own_are_one_kernel_each(tmp_path: Path) -> None:
    (tmp_path / "own.arch").write_text(OWN)
    found = generated(str(tmp_path / "own.arch"))
    assert found.fallbacks == ()
    for mark in ("* tl.sigmoid(", "tl.rsqrt(", "tl.min("):
        (own,) = [o for o in found.operators if mark in o.kernels[0].source]
        assert found.model.count(f"kernels.{own.name}(") == 1
