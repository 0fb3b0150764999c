"""The presets are the published models: the sizes of their config.json, parameters as transformers
counts them, and cache bytes per token."""

import dataclasses
import json
from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV32Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

import dslc

LLAMA = {
    "architecture": LlamaConfig, "vocab_size": 128256, "num_key_value_heads": 8,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
LLAMA_3_2 = {
    **LLAMA, "tie_word_embeddings": True, "intermediate_size": 8192,
    "rope_scaling": {**LLAMA["rope_scaling"], "factor": 32.0},
}  # fmt: skip
QWEN = {
    "architecture": Qwen2Config, "vocab_size": 152064, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 70,
    "max_position_embeddings": 32768,
}  # fmt: skip
SMALL_QWEN = {**QWEN, "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
MIXTRAL = {
    "architecture": MixtralConfig, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
    "max_position_embeddings": 32768,
}  # fmt: skip
QWEN3 = {
    "architecture": Qwen3MoeConfig, "vocab_size": 151936, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "max_position_embeddings": 40960,
}  # fmt: skip
QWEN3_NEXT = {
    "architecture": Qwen3NextConfig, "vocab_size": 151936, "num_key_value_heads": 2,
    "head_dim": 256, "num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "rope_theta": 10000000,
    "partial_rotary_factor": 0.25, "rope_scaling": None, "rms_norm_eps": 1e-6,
    "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 262144,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
DSV2 = {
    "architecture": DeepseekV2Config, "vocab_size": 102400, "first_k_dense_replace": 1,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "norm_topk_prob": False,
    "scoring_func": "softmax", "moe_layer_freq": 1, "rope_theta": 10000, "rope_scaling": YARN,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 163840,
}  # fmt: skip
DSV3_2 = {
    **DSV2, "architecture": DeepseekV32Config, "vocab_size": 129280, "first_k_dense_replace": 3,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "q_lora_rank": 1536, "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip


def sizes(hidden: int, layers: int, heads: int, ffn: int, **rest: object) -> dict[str, object]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        **rest,
    }


# (model, preset): config.json, parameters, cache bytes per token in BF16
PUBLISHED = {
    ("llama3", "1B"): (
        {**LLAMA_3_2, **sizes(2048, 16, 32, 8192, head_dim=64)}, 1_235_814_400, 32_768),
    ("llama3", "3B"): (
        {**LLAMA_3_2, **sizes(3072, 28, 24, 8192, head_dim=128)}, 3_212_749_824, 114_688),
    ("llama3", "8B"): ({**LLAMA, **sizes(4096, 32, 32, 14336)}, 8_030_261_248, 131_072),
    ("llama3", "70B"): ({**LLAMA, **sizes(8192, 80, 64, 28672)}, 70_553_706_496, 327_680),
    ("llama3", "405B"): ({**LLAMA, **sizes(16384, 126, 128, 53248)}, 405_853_388_800, 516_096),
    ("qwen2_5", "0.5B"): ({**SMALL_QWEN, **sizes(896, 24, 14, 4864)}, 494_032_768, 12_288),
    ("qwen2_5", "1.5B"): ({**SMALL_QWEN, **sizes(1536, 28, 12, 8960)}, 1_543_714_304, 28_672),
    ("qwen2_5", "3B"): ({**SMALL_QWEN, **sizes(2048, 36, 16, 11008)}, 3_085_938_688, 36_864),
    ("qwen2_5", "7B"): (
        {**QWEN, **sizes(3584, 28, 28, 18944, num_key_value_heads=4)}, 7_615_616_512, 57_344),
    ("qwen2_5", "14B"): ({**QWEN, **sizes(5120, 48, 40, 13824)}, 14_770_033_664, 196_608),
    ("qwen2_5", "32B"): ({**QWEN, **sizes(5120, 64, 40, 27648)}, 32_763_876_352, 262_144),
    ("qwen2_5", "72B"): ({**QWEN, **sizes(8192, 80, 64, 29568)}, 72_706_203_648, 327_680),
    ("mixtral", "8x7B"): (
        {**MIXTRAL, **sizes(4096, 32, 32, 14336, vocab_size=32000)}, 46_702_792_704, 131_072),
    ("mixtral", "8x22B"): (
        {**MIXTRAL, **sizes(6144, 56, 48, 16384, vocab_size=32768)}, 140_630_071_296, 229_376),
    ("qwen3_moe", "30B-A3B"): (
        {**QWEN3, **sizes(2048, 48, 32, 6144, moe_intermediate_size=768)}, 30_532_122_624, 98_304),
    ("qwen3_moe", "235B-A22B"): (
        {**QWEN3, **sizes(4096, 94, 64, 12288, moe_intermediate_size=1536)},
        235_093_634_560, 192_512),
    ("qwen3_next", "80B-A3B"): (
        {**QWEN3_NEXT, **sizes(2048, 48, 16, 5120)}, 79_674_391_296, 24_576),
    ("dsv2", "v2"): (
        {**DSV2, **sizes(5120, 60, 128, 12288, moe_intermediate_size=1536, q_lora_rank=1536,
                         n_routed_experts=160, n_group=8, topk_group=3, routed_scaling_factor=16.0,
                         topk_method="group_limited_greedy")}, 235_741_434_880, 69_120),
    ("dsv3_2", "v3_2"): (
        {**DSV3_2, **sizes(7168, 61, 128, 18432)}, 671_877_929_216, 85_888),
    ("dsv2", "lite"): (
        {**DSV2, **sizes(2048, 27, 16, 10944, moe_intermediate_size=1408, q_lora_rank=None,
                         n_routed_experts=64, n_group=1, topk_group=1, routed_scaling_factor=1.0,
                         topk_method="greedy")}, 15_706_484_224, 31_104),
}  # fmt: skip
# Billions of parameters that a token is multiplied with, as published.
ACTIVATED = {
    ("mixtral", "8x7B"): 12.9,  # these count the embedding table too
    ("mixtral", "8x22B"): 39,
    ("qwen3_moe", "30B-A3B"): 3.3,
    ("qwen3_moe", "235B-A22B"): 22,
    ("dsv2", "v2"): 21,
    ("dsv2", "lite"): 2.4,
}
every_size = pytest.mark.parametrize("name", PUBLISHED, ids="-".join)


@cache
def preset(name):
    return dslc.compile(name[0], dims=name[1])


@every_size
def test_parameters_and_cache(name):
    config, parameters, cache = PUBLISHED[name]
    report = preset(name).report()
    assert report.parameters == parameters
    assert report.cache_bytes_per_token == cache
    settings = {k: v for k, v in config.items() if k != "architecture"}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config["architecture"](**settings))
    assert sum(p.numel() for p in theirs.parameters()) == parameters


@every_size
def test_the_preset_is_the_published_config(name, tmp_path):
    """So that what is read from a checkpoint and what is known without one agree."""
    config = {k: v for k, v in PUBLISHED[name][0].items() if k != "architecture"}
    config["model_type"] = PUBLISHED[name][0]["architecture"].model_type
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "silu"}))
    ours = dslc.compile(name[0], checkpoint=str(tmp_path))
    assert rows(ours) == rows(preset(name))
    frequencies = (
        "rope_kind rope_theta rope_factor rope_gain trained_length slow_turns fast_turns norm_eps"
    )
    scaled = ours.constants["rope_kind"] != "default"  # or the trained length means nothing
    for constant in frequencies.split() if scaled else ["rope_kind", "rope_theta", "norm_eps"]:
        assert ours.constants[constant] == preset(name).constants[constant], constant


def rows(program):
    return [dataclasses.replace(row, span="") for row in program.report().blocks]


@pytest.mark.parametrize("name", ACTIVATED, ids="-".join)
def test_activated(name):
    table = PUBLISHED[name][0]["vocab_size"] * PUBLISHED[name][0]["hidden_size"]
    with_table = preset(name).report().activated + table * (name[1] != "lite")
    assert with_table / 1e9 == pytest.approx(ACTIVATED[name], rel=0.03)


def test_cache_bytes_of_the_hardware_paper():
    """arXiv:2505.09343, table 1."""
    assert preset(("qwen2_5", "72B")).report().cache_bytes_per_token == 327_680
    assert preset(("llama3", "405B")).report().cache_bytes_per_token == 516_096


def test_states_of_qwen3_next():
    """32 heads remember 128 x 128 numbers in float32, and the last 3 inputs of the convolution."""
    remembered, convolved = 32 * 128 * 128 * 4, 3 * (2 * 16 * 128 + 32 * 128) * 2
    report = preset(("qwen3_next", "80B-A3B")).report()
    assert report.state_bytes_per_sequence == 36 * (remembered + convolved)
    assert preset(("qwen3_moe", "30B-A3B")).report().state_bytes_per_sequence == 0
