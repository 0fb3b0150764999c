"""models/qwen2_5.arch is transformers' Qwen2."""

from transformers import Qwen2Config

from oracle.families import Family
from oracle.feeding import *  # noqa: F403

FAMILY = Family(
    "qwen2_5",
    Qwen2Config,
    {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2},
    newer=("layer_types",),
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CASES = {
    "plain": {"form": "v5"},
    "published": {"rope_theta": 1000000.0, "sharded": True, "sliding_window": 131072},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 0.1},
    # As the model card says for texts longer than 32,768 tokens.
    "yarn": {"rope_scaling": YARN, "rope_theta": 100.0},
}
case = FAMILY.fixture(CASES)
