"""models/llama3.arch is transformers' Llama."""

from transformers import LlamaConfig

from oracle.families import Family
from oracle.feeding import *  # noqa: F403

FAMILY = Family(
    "llama3",
    LlamaConfig,
    {"hidden_size": 42, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
)
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

CASES = {
    "plain": {},
    "published": {"rope_scaling": SCALING, "rope_theta": 500000.0, "head_dim": 16},
    # Prompts outgrow the trained length, and the ramp has an inside.
    "short": {
        "form": "v5",
        "rope_theta": 30.0,
        "head_dim": 14,
        "rope_scaling": {**SCALING, "factor": 5.0, "original_max_position_embeddings": 16},
    },
    # As the files of 3.1: heads are as wide as the model divided by their number.
    "no_head_dim": {"head_dim": ..., "hidden_size": 36, "rms_norm_eps": 0.1},
    "tied": {"tie_word_embeddings": True, "sharded": True},
    "biased": {"attention_bias": True, "num_key_value_heads": 1, "form": "v5"},
    "multi_head": {"num_key_value_heads": ...},
}
case = FAMILY.fixture(CASES)
