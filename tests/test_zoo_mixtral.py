"""models/mixtral.arch is transformers' Mixtral."""

from transformers import MixtralConfig

from oracle.families import Family
from oracle.feeding import *  # noqa: F403

FAMILY = Family(
    "mixtral",
    MixtralConfig,
    {
        "hidden_size": 42,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_local_experts": 7,
        "num_experts_per_tok": 2,
    },
)

CASES = {
    "plain": {"form": "v5"},
    "published": {"head_dim": ..., "hidden_size": 36, "rope_theta": 1000000.0, "sharded": True},
    "window": {"sliding_window": 6, "num_experts_per_tok": 3, "num_key_value_heads": 3},
    "window_of_one": {"sliding_window": 1, "num_experts_per_tok": 1, "form": "v5"},
    "all_experts": {"num_local_experts": 3, "num_experts_per_tok": 3, "num_key_value_heads": 6},
}
case = FAMILY.fixture(CASES)
