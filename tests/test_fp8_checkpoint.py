"""A checkpoint in the published FP8 form gives the logits of its dequantised weights, exactly."""

import pytest
import torch

from oracle.cases import padded, prompts, refused, rows
from oracle.checkpoint import edit_tensors, read_tensors, write_checkpoint
from oracle.compare import assert_equal, assert_greedy
from oracle.fp8 import is_fp8, quantise, to_fp8
from oracle.reference import Reference

# Over one tile of 128, so that most matrices end in partial tiles of their rows, columns or both.
WIDE = {
    "hidden_size": 149,
    "intermediate_size": 257,
    "moe_intermediate_size": 131,
    "num_hidden_layers": 2,
    "num_attention_heads": 13,
    "kv_lora_rank": 128,
    "q_lora_rank": 137,
    "qk_rope_head_dim": 4,
    "n_shared_experts": 1,
}

# Tiles and files: the published tile, and others that only config.json tells of.
FORMS = {
    "published": {"tile": (128, 128)},
    "sharded": {"tile": (128, 128), "shards": 3},
    "smaller tile": {"tile": (48, 16)},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A bfloat16 checkpoint and our program for its dims."""
    import dslc

    folder = tmp_path_factory.mktemp("fp8")
    path = write_checkpoint(folder / "bf16", seed=9, dtype=torch.bfloat16, **WIDE)
    dslc.compile("dsv3", checkpoint=str(path)).save(str(folder / "compiled"))
    return path, folder / "compiled"


@pytest.fixture(scope="module", params=FORMS)
def fp8(request, source, tmp_path_factory):
    """An FP8 checkpoint and the float32 one that it stands for."""
    target = tmp_path_factory.mktemp("form") / "fp8"
    return target, to_fp8(source[0], target, **FORMS[request.param])


def load(source, checkpoint, dtype="float32"):
    import dslc

    return dslc.load(str(source[1]), checkpoint=str(checkpoint), device="cpu", dtype=dtype)


def test_logits_are_those_of_the_dequantised_weights(source, fp8):
    stored, twin = fp8
    sequences, ref = prompts("plain"), Reference(twin)
    assert ref.routing_margin(sequences) > 1e-5
    tokens, lengths = padded(sequences)
    model = load(source, stored)
    for a, b in zip(rows(model(tokens, lengths), lengths), ref.logits(sequences), strict=True):
        assert_equal(a, b)
    unquantised = Reference(source[0]).logits(sequences)[0]
    assert (unquantised - ref.logits(sequences)[0]).abs().max() > 1e-2, "FP8 makes no difference"


def test_mtp_and_greedy_tokens_too(source, fp8):
    stored, twin = fp8
    [tokens], ref = prompts("plain", (11,)), Reference(twin)
    model = load(source, stored)
    assert_equal(model.mtp(tokens[None])[0], ref.mtp_logits([tokens])[0])
    assert_greedy(ref, tokens, model.generate(tokens[None], max_new_tokens=8)[0], 8)


def test_dequantised_weights_are_exact(source, fp8):
    """In float32 each weight is its E4M3 value times its tile's scale, to the bit."""
    stored, twin = fp8
    meant, ours = read_tensors(twin), load(source, stored).state_dict()
    for name in filter(is_fp8, meant):
        assert torch.equal(ours[name], meant[name]), name


def test_dequantised_weights_are_rounded_once_to_bfloat16(source, fp8):
    stored, twin = fp8
    meant, ours = read_tensors(twin), load(source, stored, "bfloat16").state_dict()
    for name in filter(is_fp8, meant):
        assert torch.equal(ours[name], meant[name].bfloat16()), name


def test_a_program_compiled_from_the_fp8_checkpoint_is_the_same(source, tmp_path):
    """quantization_config is no dim: compiling from the FP8 checkpoint changes nothing."""
    import dslc

    twin = to_fp8(source[0], tmp_path / "fp8")
    dslc.compile("dsv3", checkpoint=str(tmp_path / "fp8")).save(str(tmp_path / "compiled"))
    model = dslc.load(str(tmp_path / "compiled"), checkpoint=str(tmp_path / "fp8"), dtype="float32")
    [tokens] = prompts("plain", (9,))
    assert_equal(model(tokens[None])[0], Reference(twin).logits([tokens])[0])


def test_scale_tensors_decide_what_is_fp8(source, tmp_path):
    """Tensor by tensor: a projection that is not FP8, and one that elsewhere is not but here is."""
    twin = to_fp8(source[0], tmp_path / "fp8")
    plain, projection = "model.layers.1.self_attn.o_proj.weight", "model.layers.2.eh_proj.weight"
    original = read_tensors(source[0])
    stored, scales, meant = quantise(original[projection], (128, 128))

    def mix(tensors):
        tensors[plain] = original[plain]
        del tensors[plain + "_scale_inv"]
        tensors[projection], tensors[projection + "_scale_inv"] = stored, scales

    edit_tensors(tmp_path / "fp8", mix)
    edit_tensors(twin, lambda t: t.update({plain: original[plain].float(), projection: meant}))
    [tokens], ref = prompts("plain", (9,)), Reference(twin)
    model = load(source, tmp_path / "fp8")
    assert_equal(model(tokens[None])[0], ref.logits([tokens])[0])
    assert_equal(model.mtp(tokens[None])[0], ref.mtp_logits([tokens])[0])


def test_missing_scales_are_missed(source, tmp_path):
    to_fp8(source[0], tmp_path / "fp8")
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    edit_tensors(tmp_path / "fp8", lambda tensors: tensors.pop(name))
    with refused("model.layers.1.self_attn.o_proj.weight"):
        load(source, tmp_path / "fp8")


def test_scales_of_another_tiling_are_refused(source, tmp_path):
    to_fp8(source[0], tmp_path / "fp8")
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"

    def transpose(tensors):
        tensors[name] = torch.ones(5, 7)

    edit_tensors(tmp_path / "fp8", transpose)
    with refused(name):
        load(source, tmp_path / "fp8")
