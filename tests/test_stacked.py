"""A checkpoint may keep all experts of a layer in one tensor: the published form of gpt-oss."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig

import dslc
from backends.pytorch.weights.checkpoint import CheckpointError, open_checkpoint
from backends.pytorch.weights.convert import to_codes
from compiler.coding import Coding
from dsl.program import open_program
from dslc.cli import run
from oracle.families import Family
from oracle.feeding import *  # noqa: F403

MODEL = Path(__file__).parent / "oracle" / "gpt_oss.arch"
FAMILY = Family(
    str(MODEL),
    GptOssConfig,
    {
        "hidden_size": 42,
        "intermediate_size": 26,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
)
case = FAMILY.fixture({"stacked": {"form": "v5"}, "sharded": {"form": "v5", "sharded": True}})

SHARED = """
edition 2026
index t : time
block Expert[d] {{
  index f : 5
  param A[f, d]
  param b[f]
  param B[d, f]
  def (x[d]) -> y[d] {{
    h[f] = A[f,d] * x[d] + b[f]
    y[d] = B[d,f] * tanh(h[f])
  }}
}}
block Experts[d] {{
  index e : 6, k : 2
  param router[e, d]
  use expert[e] = Expert[d]
  def (x[d]) -> y[d] {{
    p[e]: f32 = softmax[e](router[e,d] * x[d])
    pick[k]   = argtop[e -> k](p[e])
    y[d]      = p[pick[k]] * expert[pick[k]](x[d])
  }}
}}
model Layers {{
  index d : 8, w : 11, l : 3
  param embed[w, d]
  use layer[l] = Experts[d]
  def main(token[t] of w) -> logits[t,w] {{
    logits[t,w] = embed[w,d] * chain[l](layer, embed[token[t], d])
  }}
}}
names Layers  {{ layer[l] = "{layer}" }}
names Experts {{ expert[e] = "{expert}" }}
names Expert  {{ B = "down" }}
"""
EACH = {"layer": "layer.{l}", "expert": "expert.{e}"}
STACKED = {**EACH, "expert": "expert[{e}]"}
BOTH = {**STACKED, "layer": "layer[{l}]"}


def model(folder: Path, **names: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "layers.arch"
    path.write_text(SHARED.format(**{**EACH, **names}))
    return path


def stacked(tensors: dict[str, torch.Tensor], layers: bool) -> dict[str, torch.Tensor]:
    """The checkpoint with one tensor per expert, stacked by hand."""
    out = {n: t for n, t in tensors.items() if "expert." not in n}
    for name in ("A", "b", "down"):
        for i in range(3):
            rows = [tensors[f"layer.{i}.expert.{e}.{name}"] for e in range(6)]
            out[f"layer.{i}.expert.{name}"] = torch.stack(rows)
    if layers:
        ends = {n.removeprefix("layer.0.") for n in out if n.startswith("layer.0.")}
        for end in ends:
            out[f"layer.{end}"] = torch.stack([out.pop(f"layer.{i}.{end}") for i in range(3)])
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A checkpoint of one tensor per expert."""
    folder = tmp_path_factory.mktemp("plain")
    path = model(folder)
    assert run(["init", str(folder / "ckpt"), str(path)]) == 0
    return folder


def logits(path: Path, checkpoint: Path, build: Path) -> torch.Tensor:
    dslc.compile(str(path)).save(str(build))
    tokens = torch.arange(11).view(1, 11)
    with torch.no_grad():
        return dslc.load(str(build), checkpoint=str(checkpoint), dtype="float32")(tokens)


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("names", [STACKED, BOTH], ids=["experts", "layers too"])
def test_a_row_of_a_stack_is_read_as_a_tensor_of_its_own(names, plain, tmp_path):
    want = logits(plain / "layers.arch", plain / "ckpt", tmp_path / "a")
    tensors = stacked(load_file(plain / "ckpt" / "model.safetensors"), names is BOTH)
    ours = checkpoint(tmp_path / "ckpt", tensors)
    assert torch.equal(logits(model(tmp_path, **names), ours, tmp_path / "b"), want)


@pytest.mark.parametrize("names", [STACKED, BOTH], ids=["experts", "layers too"])
def test_init_writes_the_stack(names, tmp_path):
    path = model(tmp_path, **names)
    assert run(["init", str(tmp_path / "ckpt"), str(path), "--init-seed", "5"]) == 0
    tensors = load_file(tmp_path / "ckpt" / "model.safetensors")
    name = "layer.expert.A" if names is BOTH else "layer.2.expert.A"
    assert list(tensors[name].shape) == ([3, 6, 5, 8] if names is BOTH else [6, 5, 8])
    dslc.compile(str(path)).save(str(tmp_path / "b"))
    read = dslc.load(str(tmp_path / "b"), checkpoint=str(tmp_path / "ckpt"), dtype="float32")
    drawn = dslc.load(str(tmp_path / "b"), seed=5)
    for key, value in drawn.state_dict().items():
        assert torch.equal(read.state_dict()[key], value.bfloat16().float()), key


def test_stacks_that_do_not_fit_are_told_once(plain, tmp_path):
    tensors = stacked(load_file(plain / "ckpt" / "model.safetensors"), False)
    tensors["layer.0.expert.A"] = tensors["layer.0.expert.A"][:4].clone()
    tensors["layer.1.expert.b"] = torch.zeros(6, 7)
    del tensors["layer.2.expert.down"]
    ours = checkpoint(tmp_path / "ckpt", tensors)
    dslc.compile(str(model(tmp_path, **STACKED))).save(str(tmp_path / "b"))
    with pytest.raises(CheckpointError) as found:
        dslc.load(str(tmp_path / "b"), checkpoint=str(ours))
    assert str(found.value) == (
        f"the checkpoint in {ours} does not fit the model: 3 things are wrong\n"
        "  layer.0.expert.A: expected [6, 5, 8], found [4, 5, 8]\n"
        "  layer.1.expert.b: expected [6, 5], found [6, 7]\n"
        "  layer.2.expert.down: missing, expected [6, 8, 5]"
    )


def test_quantize_says_that_it_leaves_stacks(plain, tmp_path):
    tensors = stacked(load_file(plain / "ckpt" / "model.safetensors"), False)
    ours = open_checkpoint(checkpoint(tmp_path / "ckpt", tensors))
    coding = Coding(open_program("dsv3").formats["e4m3"], 128, 128)
    with pytest.raises(CheckpointError) as found:
        to_codes(ours, {f"layer.0.expert[{e}].A": coding for e in range(6)})
    assert str(found.value).endswith(
        "layer.0.expert.A: is stacked, one tensor for several matrices; only matrices have blocks"
    )


def test_brackets_hold_nothing_else(tmp_path, capsys):
    path = model(tmp_path, expert="expert[{e}")
    assert run(["check", str(path)]) == 1
    assert (
        "square brackets hold the place in a stacked tensor: a number, or {i}"
        in capsys.readouterr().err
    )


def test_block_scaled_stacks(plain, tmp_path):
    """Each matrix of a stack has its own blocks; scales are stacked as the codes are."""
    tensors = stacked(load_file(plain / "ckpt" / "model.safetensors"), False)
    exact = dict(tensors)
    for i in range(3):
        name = f"layer.{i}.expert.A"
        codes = (exact[name].float() * 8).to(torch.float8_e4m3fn)
        scale = torch.arange(1, 6 * 3 * 4 + 1).view(6, 3, 4).float() / 64
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
        wide = scale.repeat_interleave(2, 1)[:, :5].repeat_interleave(2, 2)
        exact[name] = codes.float() * wide
    ours = checkpoint(tmp_path / "fp8", tensors)
    config = {"quantization_config": {"weight_block_size": [2, 2]}}
    (ours / "config.json").write_text(json.dumps(config))
    widened = checkpoint(tmp_path / "wide", exact)
    path = model(tmp_path, **STACKED)
    dslc.compile(str(path)).save(str(tmp_path / "b"))
    tokens = torch.arange(11).view(1, 11)
    with torch.no_grad():
        a, b = (
            dslc.load(str(tmp_path / "b"), checkpoint=str(c), dtype="float32")(tokens)
            for c in (ours, widened)
        )
    assert torch.equal(a, b)
