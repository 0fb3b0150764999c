"""Checkpoints whose config.json asks for other mathematics are refused, and the key is named."""

import pytest

import dslc
from oracle.cases import refused
from oracle.checkpoint import edit_config, edit_tensors, read_tensors
from test_zoo_dsv2 import FAMILY as DSV2
from test_zoo_dsv3_2 import FAMILY as DSV3_2
from test_zoo_llama3 import FAMILY as LLAMA3
from test_zoo_mixtral import FAMILY as MIXTRAL
from test_zoo_qwen2_5 import FAMILY as QWEN2_5
from test_zoo_qwen3_moe import FAMILY as QWEN3_MOE

LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"type": "dynamic", "factor": 2.0}
REFUSED = [
    (LLAMA3, {"model_type": "gemma"}),
    (LLAMA3, {"mlp_bias": True}),
    (LLAMA3, {"hidden_act": "gelu"}),
    (LLAMA3, {"rope_scaling": LINEAR}),
    (QWEN2_5, {"model_type": "qwen3"}),
    (QWEN2_5, {"use_sliding_window": True}),
    (QWEN2_5, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    (QWEN2_5, {"rope_scaling": DYNAMIC}),
    (MIXTRAL, {"tie_word_embeddings": True}),
    (MIXTRAL, {"rope_scaling": {"type": "yarn", "factor": 2.0}}),
    (QWEN3_MOE, {"decoder_sparse_step": 2}),
    (QWEN3_MOE, {"mlp_only_layers": [0, 2]}),
    (QWEN3_MOE, {"use_sliding_window": True}),
    (DSV2, {"scoring_func": "sigmoid"}),
    (DSV2, {"topk_method": "noaux_tc"}),
    (DSV2, {"norm_topk_prob": True}),
    (DSV2, {"attention_bias": True}),
    (DSV2, {"moe_layer_freq": 2}),
    (DSV3_2, {"model_type": "deepseek_v3"}),
    (DSV3_2, {"layer_types": ["full_attention"] * 3}),
]


@pytest.mark.parametrize(
    ("family", "change"), REFUSED, ids=[f"{f.file}-{next(iter(c))}" for f, c in REFUSED]
)
def test_other_mathematics(tmp_path, family, change):
    path = family.write(tmp_path / "checkpoint")
    edit_config(path, **change)
    with refused(next(iter(change))):
        dslc.compile(family.file, checkpoint=str(path))


def test_an_indexer_without_compressed_queries(tmp_path):
    path = DSV3_2.write(tmp_path / "checkpoint")
    edit_config(path, q_lora_rank=None)
    with refused("q_rank is null"):
        dslc.compile("dsv3_2", checkpoint=str(path))


def test_heads_that_groups_do_not_divide(tmp_path):
    path = LLAMA3.write(tmp_path / "checkpoint")
    edit_config(path, num_key_value_heads=4)
    with refused("kv_heads", "3/2"):
        dslc.compile("llama3", checkpoint=str(path))


def test_a_tied_checkpoint_may_hold_the_head_or_not(tmp_path):
    """Some writers repeat the table as lm_head.weight; the model reads it once."""
    path = QWEN2_5.write(tmp_path / "checkpoint", tie_word_embeddings=True)
    assert "lm_head.weight" not in read_tensors(path)
    program = dslc.compile("qwen2_5", checkpoint=str(path))
    program.save(str(tmp_path / "compiled"))
    edit_tensors(
        path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    with pytest.warns(UserWarning, match=r"does not use: lm_head\.weight"):
        model = dslc.load(str(tmp_path / "compiled"), checkpoint=str(path))
    assert "lm_head.weight" not in model.state_dict()


def test_latent_attention_with_fewer_heads_of_keys(tmp_path):
    """Each head expands keys and values of its own; transformers would repeat them."""
    path = DSV3_2.write(tmp_path / "checkpoint")
    edit_config(path, num_key_value_heads=1)
    with refused("kv_heads == heads", "kv_heads is 1"):
        dslc.compile("dsv3_2", checkpoint=str(path))
