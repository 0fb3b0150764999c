"""models/qwen3_moe.arch is transformers' Qwen3-MoE."""

from transformers import Qwen3MoeConfig

from oracle.families import Family
from oracle.feeding import *  # noqa: F403

FAMILY = Family(
    "qwen3_moe",
    Qwen3MoeConfig,
    {
        "hidden_size": 29,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_experts": 11,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 17,
        "norm_topk_prob": True,
    },
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CASES = {
    "plain": {"form": "v5"},
    "published": {"rope_theta": 1000000.0, "sharded": True, "sliding_window": 4096},
    "unnormalised": {"norm_topk_prob": ..., "tie_word_embeddings": True},
    "biased": {"attention_bias": True, "num_key_value_heads": 3, "rms_norm_eps": 0.1},
    "yarn": {"rope_scaling": YARN, "rope_theta": 100.0, "head_dim": 14},
}
case = FAMILY.fixture(CASES)
