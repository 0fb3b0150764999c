"""What is left to torch: for shipped models and GPUs, and for a model of a user's own."""

import re
from functools import cache
from pathlib import Path

import pytest
from own_model import OWN

from backends.triton.generate import generate
from backends.triton.targets import TARGETS
from dslc.program import compile_file


@cache
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


RULES = """edition 2026
import dsv3
import std.formats
deploy whole of DeepSeekV3 { precision whole(int8, activations = 1 x 128, weights = 128 x 128)
  for contractions with a parameter, except embed, head, centroid, W_eh }
deploy light of DeepSeekV3 { precision light(weights = e4m3 128 x 128)
  for contractions with a parameter, except embed, head, centroid, W_eh }
deploy narrow of DeepSeekV3 { precision narrow(e4m3, activations = 1 x 16, weights = 16 x 16)
  for contractions with a parameter, except embed, head, centroid, W_eh }
"""


@pytest.mark.parametrize(
    ("deploy", "target"),
    [("whole", "sm_90"), ("whole", "sm_80"), ("light", "gfx942"), ("narrow", "sm_100")],
)
def test_codes_that_no_kernel_reads_are_left_to_torch(
    tmp_path: Path, deploy: str, target: str
) -> None:
    """Whole numbers, 8-bit floats on a GPU without them, tiles narrower than a product: what reads
    them, and the attention over keys that are made of them."""
    (tmp_path / "rules.arch").write_text(RULES)
    found = generated(str(tmp_path / "rules.arch"), target, dims="small", deploy=deploy)
    ops = {f.op for f in found.fallbacks}
    assert {"attention", "experts"} <= ops and ops & {"contract", "scaled_contract"}
    assert all(f.place.startswith("std/") for f in found.fallbacks)
    assert not [o for o in found.operators if "e4m3" in o.name]


def test_an_activation_and_a_norm_of_ones_own_are_one_kernel_each(tmp_path: Path) -> None:
    (tmp_path / "own.arch").write_text(OWN)
    found = generated(str(tmp_path / "own.arch"))
    assert found.fallbacks == ()
    for mark in ("* tl.sigmoid(", "tl.rsqrt(", "tl.min("):
        (own,) = [o for o in found.operators if mark in o.kernels[0].source]
        assert found.model.count(f"kernels.{own.name}(") == 1


def written(model: str, name: str) -> list[str]:
    """The calls of kernels whose names begin so."""
    return re.findall(rf"kernels\.({name}\w*)\(", model)


def test_a_residual_is_added_by_the_norm_behind_it() -> None:
    """Where the sum is read again, as residuals are: it comes back with the norm."""
    found = generated("dsv3", deploy="fp8")
    assert set(written(found.model, "rms_norm_7168_residual")) == {
        "rms_norm_7168_residual_e4m3_1x128",  # in front of projections: codes
        "rms_norm_7168_residual",  # in front of a router, which reads numbers
    }
    assert "h_codes, h_scales, h = kernels.rms_norm_7168_residual_e4m3_1x128(" in found.model


@pytest.mark.parametrize(
    ("file", "kernels"),
    [
        ("dsv3", {"rotary_pairs_128x64_from24576_192_at128", "rotary_pairs_1x64_from576_64_at512"}),
        (
            "llama3",
            {"rotary_halves_32x128_from4096_128_at0", "rotary_halves_8x128_from1024_128_at0"},
        ),
    ],
)
def test_rotations_are_read_where_heads_lie(file: str, kernels: set[str]) -> None:
    """A part of each head, or of the row that a product gave, is turned without being copied."""
    assert set(written(generated(file).model, "rotary")) == kernels


NEAR_ROTARY = """edition 2026

index t : time

const width = 32

model Turned {{
  index d : width, p : width / 2, o : 2
  param rate[p]

  def main(x[t,d]) -> y[t,d] {{
    let c[t,p]: f32 = cos(position[t] * rate[p])
    let s[t,p]: f32 = sin(position[t] * rate[p])
    y[t,(p,o)] = stack[o](x[t,(p,0)] * c[t,p] - x[t,(p,1)] * s[t,p], {second})
  }}
}}
"""


@pytest.mark.parametrize(
    ("second", "turns"),
    [
        ("x[t,(p,1)] * c[t,p] + x[t,(p,0)] * s[t,p]", True),
        ("s[t,p] * x[t,(p,0)] + c[t,p] * x[t,(p,1)]", True),
        ("x[t,(p,1)] * c[t,p] + x[t,(p,1)] * s[t,p]", False),  # not the other of the pair
        ("x[t,(p,1)] * s[t,p] + x[t,(p,0)] * c[t,p]", False),  # cosine and sine change places
    ],
)
def test_what_only_looks_like_a_rotation_is_none(second: str, turns: bool, tmp_path: Path) -> None:
    file = tmp_path / "turned.arch"
    file.write_text(NEAR_ROTARY.format(second=second))
    found = generated(str(file))
    assert bool(written(found.model, "rotary")) == turns
