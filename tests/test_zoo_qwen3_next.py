"""models/qwen3_next.arch is transformers' Qwen3-Next: gated delta rule and gated attention."""

import torch
from transformers import Qwen3NextConfig

from oracle.compare import assert_equal
from oracle.families import Case, Family
from oracle.feeding import *  # noqa: F403

FAMILY = Family(
    "qwen3_next",
    Qwen3NextConfig,
    {
        "hidden_size": 29,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,  # a quarter of it is turned: 6 of 24
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 7,
        "linear_value_head_dim": 5,
        "moe_intermediate_size": 17,
        "shared_expert_intermediate_size": 13,
        "num_experts": 11,
        "num_experts_per_tok": 4,
    },
    newer=("layer_types",),
)

CASES = {
    "plain": {"form": "v5"},
    # With a small eps, transformers itself is 1e-5 off the truth after eight such layers.
    "published": {
        "num_hidden_layers": 8,
        "sharded": True,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-3,
        "seed": 3,
    },
    # Three tokens' convolution, a head of values for each of keys, half of each head turned.
    "other": {
        "linear_conv_kernel_dim": 3,
        "linear_num_value_heads": 3,
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": False,
        "form": "v5",
    },
    "tied": {"tie_word_embeddings": True, "linear_conv_kernel_dim": 1, "form": "v5"},
}
case = FAMILY.fixture(CASES)


def test_several_chunks_of_the_recurrence(tmp_path):
    case = Case(FAMILY, tmp_path, CASES["published"])
    [tokens] = case.prompts(150)
    [expected] = case.reference.logits([tokens])
    cache = case.model.new_cache(1, capacity=150)
    rows = [case.model(part[None], cache=cache)[0] for part in tokens.split([70, 1, 79])]
    assert_equal(torch.cat(rows), expected)
    assert_equal(case.model(tokens[None])[0], expected)
