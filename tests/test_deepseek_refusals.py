"""Checkpoints that are not what models/dsv3.arch describes are refused with one clear message."""

import json

import pytest
import torch

from oracle.cases import ROOT, YARN, command, load, model, prompts, refused
from oracle.checkpoint import edit_config, edit_tensors, write_checkpoint
from oracle.compare import assert_equal
from oracle.reference import Reference

# Settings that would change the mathematics; transformers ignores the first three.
OTHER_MATHEMATICS = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "moe_layer_freq": 2,
    "hidden_act": "gelu",
    "attention_bias": True,
    "rope_interleave": False,
    "tie_word_embeddings": True,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "index_topk": 2048,  # DeepSeek-V3.2
}


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("key", OTHER_MATHEMATICS)
def test_other_mathematics(checkpoint, key):
    import dslc

    edit_config(checkpoint, **{key: OTHER_MATHEMATICS[key]})
    value = "linear" if key == "rope_scaling" else str(OTHER_MATHEMATICS[key])
    with refused(key, value):
        dslc.compile("dsv3", checkpoint=str(checkpoint))


@pytest.mark.parametrize("setting", [{"attention_factor": 1.5}, {"truncate": False}])
def test_rarer_settings_of_yarn_are_never_ignored(tmp_path, setting):
    """Either they are refused by name, or the logits are transformers'."""
    import dslc

    scaling = {**YARN, "original_max_position_embeddings": 64, **setting}
    path = write_checkpoint(tmp_path / "c", rope_scaling=scaling, qk_rope_head_dim=14)
    try:
        program = dslc.compile("dsv3", checkpoint=str(path))
    except Exception as error:
        assert next(iter(setting)) in str(error), error
        return
    program.save(str(tmp_path / "compiled"))
    [tokens] = prompts("plain", (23,))
    loaded = dslc.load(str(tmp_path / "compiled"), checkpoint=str(path), dtype="float32")
    assert_equal(loaded(tokens[None])[0], Reference(path).logits([tokens])[0])


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "wide"), ("num_attention_heads", 3.5), ("n_group", 5)]
)
def test_sizes_that_cannot_be(checkpoint, key, value):
    """Not a number, not a whole number, and groups that do not divide the experts."""
    import dslc

    edit_config(checkpoint, **{key: value})
    with refused(str(value)):
        dslc.compile("dsv3", checkpoint=str(checkpoint))


def test_a_missing_size(checkpoint):
    import dslc

    edit_config(checkpoint, kv_lora_rank=...)
    with refused("kv_lora_rank"):
        dslc.compile("dsv3", checkpoint=str(checkpoint))


def test_the_command_says_it_in_a_few_lines(checkpoint, tmp_path):
    edit_config(checkpoint, scoring_func="softmax")
    done = command("compile", "dsv3", "--checkpoint", checkpoint, "-o", tmp_path / "compiled")
    assert done.returncode == 1
    assert "scoring_func" in done.stderr and "softmax" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 15
    assert done.stdout == "" and not (tmp_path / "compiled").exists()


def test_no_checkpoint_there(tmp_path):
    done = command("compile", ROOT / "models" / "dsv3.arch", "--checkpoint", tmp_path / "nothing")
    assert done.returncode != 0
    assert str(tmp_path / "nothing") in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr


def test_a_missing_tensor_is_named(checkpoint):
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    edit_tensors(checkpoint, lambda tensors: tensors.pop(name))
    with refused(name):
        load("plain", checkpoint)


def test_a_tensor_of_another_shape_is_named(checkpoint):
    """Transposed, it has as many elements as it should."""
    name = "model.layers.0.self_attn.q_b_proj.weight"

    def transpose(tensors):
        tensors[name] = tensors[name].T.contiguous()

    edit_tensors(checkpoint, transpose)
    with refused(name, "33", "13"):
        load("plain", checkpoint)


def test_a_checkpoint_of_other_dims_does_not_fit(tmp_path):
    other = write_checkpoint(tmp_path / "other", hidden_size=31)
    with refused("31", "29"):
        load("plain", other)


def test_a_truncated_file_is_named(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with refused("model.safetensors"):
        load("plain", checkpoint)


@pytest.mark.parametrize("where", ["..", "absolute"])
def test_an_index_may_not_leave_its_folder(tmp_path, where):
    """Not even for a file that is there and holds what is wanted."""
    path = write_checkpoint(tmp_path / "checkpoint", sharded=True)
    index = path / "model.safetensors.index.json"
    shard = next(iter(json.loads(index.read_text())["weight_map"].values()))
    (path / shard).rename(tmp_path / "outside.safetensors")
    folder = tmp_path if where == "absolute" else where
    index.write_text(index.read_text().replace(shard, f"{folder}/outside.safetensors"))
    with refused("outside.safetensors"):
        load("plain", path)


@pytest.mark.parametrize("tokens", [[[3, 97]], [[-1, 3]], [3, 5]])
def test_tokens_that_are_none(tokens):
    """Past the vocabulary, below it, and without a batch."""
    with refused():
        model("plain")(torch.tensor(tokens))
