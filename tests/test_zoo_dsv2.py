"""models/dsv2.arch is transformers' DeepSeek-V2."""

from transformers import DeepseekV2Config

from oracle.families import Family
from oracle.feeding import *  # noqa: F403

FAMILY = Family(
    "dsv2",
    DeepseekV2Config,
    {
        "hidden_size": 27,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "moe_intermediate_size": 17,
        "first_k_dense_replace": 1,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 13,
        "kv_lora_rank": 14,  # transformers turns complex numbers: this and the next are even
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 6,
        "v_head_dim": 7,
        "routed_scaling_factor": 3.0,
    },
    newer=("head_dim", "qk_head_dim", "mlp_bias"),
)
YARN = {
    "rope_type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
LITE = {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}

CASES = {
    "plain": {"form": "v5", "seed": 9},
    "published": {"rope_scaling": YARN, "qk_rope_head_dim": 14, "sharded": True},
    "lite": {**LITE, "rope_scaling": YARN, "routed_scaling_factor": 1.0},
    # The greedy choice takes no notice of groups.
    "lite_v5": {**LITE, "form": "v5", "n_group": 4, "topk_group": 2, "n_shared_experts": 1},
    "no_groups": {**LITE, "n_group": None, "topk_group": None, "first_k_dense_replace": 0},
    "yarn_v5": {
        "form": "v5",
        "rope_theta": 500.0,
        "qk_rope_head_dim": 10,
        "rope_scaling": {
            **YARN,
            "factor": 7,
            "original_max_position_embeddings": 16,
            "mscale": 1.2,
        },
    },
    # More are picked than stand in the open group: the rest weigh nothing.
    "closed_groups": {"topk_group": 1, "num_experts_per_tok": 5, "n_shared_experts": 1},
    "all_dense": {"first_k_dense_replace": 3},
}
case = FAMILY.fixture(CASES)
