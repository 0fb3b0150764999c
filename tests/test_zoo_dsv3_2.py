"""models/dsv3_2.arch is transformers' DeepSeek-V3.2: attention to tokens that an indexer chose."""

import pytest
import torch
from transformers import DeepseekV32Config

import dslc
from oracle.families import Family
from oracle.feeding import *  # noqa: F403

# transformers writes no MTP module; ours is V3's.
pytestmark = pytest.mark.filterwarnings("ignore:'mtp' is not available")

FAMILY = Family(
    "dsv3_2",
    DeepseekV32Config,
    {
        "hidden_size": 29,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "moe_intermediate_size": 17,
        "first_k_dense_replace": 1,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 13,
        "kv_lora_rank": 11,
        "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 6,
        "v_head_dim": 7,
        "index_topk": 5,
        "index_n_heads": 19,  # with few heads many tokens are worth exactly nothing, and tie
        "index_head_dim": 11,
    },
    newer=("head_dim", "qk_head_dim", "mlp_bias", "layer_types", "mlp_layer_types"),
)
YARN = {
    "rope_type": "yarn",
    "factor": 7,
    "original_max_position_embeddings": 16,
    "beta_fast": 3,
    "beta_slow": 0.25,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}

CASES = {
    "plain": {"form": "v5"},
    "published": {"rope_scaling": YARN, "rope_theta": 500.0, "index_topk": 3, "sharded": True},
    "one_token": {"index_topk": 1, "index_head_dim": 7, "norm_topk_prob": False},
    "more_than_there_are": {"index_topk": 100, "first_k_dense_replace": 3, "form": "v5"},
}
case = FAMILY.fixture(CASES)


def test_what_is_chosen_matters(case):
    """The same weights say something else where all tokens are chosen, as soon as some are not."""
    [tokens] = case.prompts(23)
    layers = [layer.self_attn.indexer for layer in case.reference.model.model.layers]
    chosen = layers[0].index_topk
    for indexer in layers:
        indexer.index_topk = 100
    dense = case.reference.logits([tokens])[0]
    for indexer in layers:
        indexer.index_topk = chosen
    sparse = case.model(tokens[None])[0]
    assert torch.allclose(sparse[:chosen], dense[:chosen], atol=1e-4)
    assert torch.allclose(sparse, dense, atol=1e-4) == (chosen == 100)


def test_flops_are_those_of_what_is_chosen():
    """Keys of 192 and values of 128 numbers for each of 128 heads in 61 layers."""

    def attention(chosen):
        return dslc.compile("dsv3_2", set={"index_topk": chosen}).report(4096).forward_flops

    def pairs(chosen):
        return sum(min(t + 1, chosen) for t in range(4096)) / 4096

    each = 2 * 61 * 128 * (192 + 128)
    for chosen in (1024, 2048):
        saved = attention(4096) - attention(chosen)
        assert saved == pytest.approx(each * (pairs(4096) - pairs(chosen)))
