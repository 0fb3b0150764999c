"""The oracle itself: is it DeepSeek-V3, and well enough conditioned to judge by?"""

import json

import pytest
import torch
import torch.nn.functional as F

from oracle.cases import CASES, YARN, checkpoint, prompts, reference
from oracle.checkpoint import edit_config, edit_tensors, read_tensors, write_checkpoint
from oracle.compare import assert_equal, assert_greedy
from oracle.fp8 import is_fp8, to_fp8
from oracle.reference import Reference

TOKENS = torch.randint(97, (23,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
def test_cases_are_well_conditioned(case):
    """No routing decision hangs on rounding, and logits are of ordinary size and not all alike."""
    sequences = prompts(case)
    assert reference(case).routing_margin(sequences) > 1e-5
    assert reference(case).routing_margin(sequences[:1], mtp=True) > 1e-5
    logits = torch.cat(reference(case).logits(sequences))
    assert 0.3 < logits.std() < 10
    assert len(logits.argmax(-1).unique()) > 10


def test_both_config_forms_mean_the_same(tmp_path):
    for scaling in (None, YARN):
        for form in ("published", "v5"):
            write_checkpoint(tmp_path / form, form=form, rope_scaling=scaling)
        old, new = tmp_path / "published", tmp_path / "v5"
        keys = [json.loads((path / "config.json").read_text()).keys() for path in (old, new)]
        only_old = {"rope_scaling", "rope_theta", "scoring_func", "torch_dtype"}
        assert keys[0] >= only_old and not keys[1] & only_old
        assert keys[1] >= {"rope_parameters", "dtype"} and "rope_parameters" not in keys[0]
        a, b = (Reference(path).logits([TOKENS])[0] for path in (old, new))
        assert torch.equal(a, b)


def test_yarn_and_its_settings_are_seen_in_the_logits(tmp_path):
    variants = [
        None,
        YARN,
        {**YARN, "mscale_all_dim": 0},
        {**YARN, "factor": 4},
        {**YARN, "beta_fast": 2},
    ]
    seen = []
    for i, scaling in enumerate(variants):
        path = write_checkpoint(tmp_path / str(i), qk_rope_head_dim=14, rope_scaling=scaling)
        seen.append(Reference(path).logits([TOKENS])[0])
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert (a - b).abs().max() > 1e-3 * b.abs().max()


def test_tensor_names_are_the_published_ones():
    names = set(read_tensors(checkpoint("plain")))
    for expected in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.experts.11.down_proj.weight",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.enorm.weight",
        "model.layers.3.hnorm.weight",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.shared_head.norm.weight",
        "model.layers.3.shared_head.head.weight",
        "model.layers.3.mlp.experts.0.gate_proj.weight",
    ):
        assert expected in names
    assert not any(".layers.4." in name for name in names)


def test_sharded_checkpoint_holds_the_same_tensors(tmp_path):
    write_checkpoint(tmp_path / "one")
    write_checkpoint(tmp_path / "many", sharded=True)
    one, many = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)


def test_checkpoint_without_mtp_tensors_still_announces_the_layer(tmp_path):
    path = write_checkpoint(tmp_path / "c", mtp=False)
    assert not any(".layers.3." in name for name in read_tensors(path))
    assert json.loads((path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert Reference(path).logits([TOKENS])[0].shape == (23, 97)


def test_bfloat16_checkpoint_keeps_the_router_bias_in_float32(tmp_path):
    tensors = read_tensors(write_checkpoint(tmp_path / "c", dtype=torch.bfloat16))
    assert {t.dtype for n, t in tensors.items() if n.endswith("bias")} == {torch.float32}
    assert {t.dtype for n, t in tensors.items() if not n.endswith("bias")} == {torch.bfloat16}


def test_constant_routing_survives_bfloat16(tmp_path):
    path = write_checkpoint(tmp_path / "c", dtype=torch.bfloat16, constant_routing=True)
    assert Reference(path).routing_margin([TOKENS]) > 2


@pytest.mark.parametrize("case", ["plain", "yarn", "all_dense"])
def test_mtp_module_is_equations_21_to_23(case):
    """Straight from the file's tensors: the normalised embedding of token t + 1 first, then the
    main model's final hidden state at t after its own norm, projected, through one more MoE layer,
    its norm and the shared head."""
    ref, tensors = reference(case), read_tensors(checkpoint(case))
    tokens, last = prompts(case)[0], f"model.layers.{reference(case).layers}."

    def rms(x, name):
        return tensors[name] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    with torch.no_grad():
        hidden = ref.model.model(tokens[None]).last_hidden_state[0, :-1]
        embedded = tensors[last + "embed_tokens.weight"][tokens[1:]]
        both = [rms(embedded, last + "enorm.weight"), rms(hidden, last + "hnorm.weight")]
        x = torch.cat(both, -1) @ tensors[last + "eh_proj.weight"].T
        block = ref.mtp.layers[0].mtp_block
        rotary = ref.model.model.rotary_emb(x[None], torch.arange(len(x))[None])
        causal = torch.full((len(x), len(x)), -torch.inf).triu(1)[None, None]
        y = block(x[None], attention_mask=causal, position_embeddings=rotary)[0]
        logits = (
            rms(y, last + "shared_head.norm.weight") @ tensors[last + "shared_head.head.weight"].T
        )
    assert_equal(ref.mtp_logits([tokens])[0], logits, "MTP logits")
    stored = block.self_attn.kv_b_proj.weight
    assert torch.equal(stored, tensors[last + "self_attn.kv_b_proj.weight"])


def test_mtp_logits_are_what_speculative_generation_drafts_from():
    """Prefix by prefix, as transformers' own generate(use_mtp=True) asks for them."""
    ref, tokens = reference("yarn"), prompts("yarn")[0]
    full = ref.mtp_logits([tokens])[0]
    for n in (2, 5, 23):
        assert_equal(ref.mtp_logits([tokens[:n]])[0][-1], full[n - 2], f"row {n - 2}")
    greedy = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    drafted = ref.model.generate(tokens[None], use_mtp=True, **greedy)
    assert torch.equal(ref.model.generate(tokens[None], **greedy), drafted)


def test_greedy_is_transformers_generate():
    ref, prompt = reference("plain"), prompts("plain")[2]
    tokens, margins = ref.greedy(prompt, 12)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = ref.model.generate(prompt[None], **greedy)
    assert margins.min() > 1e-4
    assert tokens.tolist() == theirs[0].tolist()
    assert_greedy(ref, prompt, tokens, 12)
    wrong = tokens.clone()
    wrong[-3] = (wrong[-3] + 1) % 97
    with pytest.raises(AssertionError, match="step 9: token"):
        assert_greedy(ref, prompt, wrong, 12)


@pytest.mark.parametrize("mtp", [False, True])
def test_gradients_carry_the_file_s_names_and_predict_the_loss(tmp_path, mtp):
    """A small step along a gradient changes the loss by the step times the gradient's square."""
    path = write_checkpoint(tmp_path / "c")
    ref, tensors = Reference(path), read_tensors(path)
    gradients = ref.gradients(TOKENS, mtp=mtp)
    shared_or_not_trained = (
        "bias",
        ".3.embed_tokens",
        "shared_head.head",
        *([] if mtp else ["layers.3."]),
    )
    expected = {n for n in tensors if not any(part in n for part in shared_or_not_trained)}
    assert gradients.keys() == expected
    assert all(gradients[n].shape == tensors[n].shape for n in expected)

    def loss():
        if mtp:
            return F.cross_entropy(ref.mtp_logits([TOKENS])[0][:-1].double(), TOKENS[2:])
        return F.cross_entropy(ref.logits([TOKENS])[0][:-1].double(), TOKENS[1:])

    name = "model.layers.1.self_attn.kv_b_proj.weight"
    weight, gradient, before = ref.model.get_parameter(name), gradients[name].clone(), loss()
    with torch.no_grad():
        weight -= 1e-3 * gradient
    assert before - loss() == pytest.approx(float(1e-3 * gradient.pow(2).sum()), rel=0.05)


def test_assert_equal_says_where_and_how_much():
    b = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert_equal(b + 5e-6 * b.abs().max(), b)
    a = b.clone()
    a[2, 3] += 0.01
    with pytest.raises(AssertionError, match=r"logits differs.*allowed 1e-05") as caught:
        assert_equal(a, b, "logits")
    assert "worst at (2, 3)" in str(caught.value) and "in rows [2] of 4" in str(caught.value)
    with pytest.raises(AssertionError, match="shape"):
        assert_equal(b[:3], b)
    with pytest.raises(AssertionError, match="not finite"):
        assert_equal(b * torch.nan, b)


def test_fp8_form_is_what_the_published_checkpoint_holds(tmp_path):
    dims = {"hidden_size": 149, "intermediate_size": 131}
    source = write_checkpoint(tmp_path / "bf16", **dims, dtype=torch.bfloat16)
    twin = to_fp8(source, tmp_path / "fp8")
    stored, meant, original = (read_tensors(p) for p in (tmp_path / "fp8", twin, source))
    fp8 = {n for n in original if is_fp8(n)}
    assert meant.keys() == original.keys()
    assert stored.keys() == original.keys() | {n + "_scale_inv" for n in fp8}
    for name in original:
        kept = ("norm", "embed_tokens", "head", "mlp.gate.", "eh_proj")
        assert (name in fp8) != any(part in name for part in kept), name
    for name in fp8:
        assert stored[name].dtype == torch.float8_e4m3fn
        assert stored[name + "_scale_inv"].dtype == torch.float32
        tiles = tuple(-(-n // 128) for n in original[name].shape)
        assert stored[name + "_scale_inv"].shape == tiles
        # Three bits follow the leading one; below E4M3's normal range its smallest step is left.
        exact = original[name].float()
        step = exact.abs().max() / 448 / 512
        assert ((meant[name] - exact).abs() <= exact.abs() / 16 + step).all()
        assert stored[name].float().abs().max() == 448
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def test_fp8_tiles_are_dequantised_as_transformers_does(tmp_path):
    """transformers' own dequantisation, where it can: it wants whole tiles."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    dims = {"hidden_size": 32, "kv_lora_rank": 8, "qk_rope_head_dim": 8}
    source = write_checkpoint(tmp_path / "c", **dims, dtype=torch.bfloat16)
    twin = to_fp8(source, tmp_path / "fp8", tile=(16, 16))
    stored, meant = read_tensors(tmp_path / "fp8"), read_tensors(twin)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert stored[name].shape == (16, 32)
    theirs = Fp8Dequantize(None)._dequantize_one(stored[name], stored[name + "_scale_inv"])
    assert_equal(theirs.float(), meant[name], tolerance=2**-8)


def test_fp8_shards_part_weights_from_their_scales(tmp_path):
    source = write_checkpoint(tmp_path / "c")
    to_fp8(source, tmp_path / "one")
    to_fp8(source, tmp_path / "many", shards=4)
    one, many = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)
    index = (tmp_path / "many" / "model.safetensors.index.json").read_text()
    where = json.loads(index)["weight_map"]
    assert where.keys() == many.keys()
    assert all(where[n] != where[n + "_scale_inv"] for n in one if is_fp8(n))


def test_written_checkpoints_can_be_edited(tmp_path):
    path = write_checkpoint(tmp_path / "c")
    edit_config(path, hidden_act="gelu", rope_theta=...)
    config = json.loads((path / "config.json").read_text())
    assert config["hidden_act"] == "gelu" and "rope_theta" not in config
    edit_tensors(path, lambda tensors: tensors.pop("model.norm.weight"))
    assert "model.norm.weight" not in read_tensors(path)
