"""How long a sequence may be, as the source says it."""

import pytest
import torch
from small import SIZES, prompts

import dslc
from backends.pytorch.inputs import InputError


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model made for 12 positions."""
    folder = tmp_path_factory.mktemp("short")
    plain = {"rope_kind": "default", "rope_factor": 1.0, "max_positions": 12}
    dslc.compile("dsv3", set=SIZES | plain).save(folder / "model")
    return dslc.load(folder / "model")


def refused(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


SAID = "the model is made for 12 (require history <= context_length, std/rotary.arch:23)"


def test_a_prompt_and_its_new_tokens_must_fit(short):
    told = []
    ragged = torch.tensor([5, 9])

    def call():
        short.generate(prompts(2, 9), ragged, 4, on_token=lambda *_: told.append(1))

    message = refused(call)
    assert message == f"a prompt of 9 and 4 new tokens are 13 positions; {SAID}"
    assert not told
    assert short.generate(prompts(2, 9), max_new_tokens=3).shape == (2, 12)
    assert len(short.generate(prompts(2, 9)[:, :5], max_new_tokens=7)) == 2


def test_so_must_a_sequence_however_it_grows(short):
    assert refused(lambda: short(prompts(1, 13))) == f"a sequence of 13 positions; {SAID}"
    assert short(prompts(1, 12)).shape == (1, 12, 51)
    cache = short.new_cache(1)
    short(prompts(1, 11), cache=cache)
    short(prompts(1, 1), cache=cache)
    assert refused(lambda: short(prompts(1, 1), cache=cache)).startswith("a sequence of 13")
    assert cache.lengths == [12]


def test_a_source_may_set_no_limit(tmp_path):
    dslc.compile("dsv3", set=SIZES | {"max_positions": None}).save(tmp_path / "any")
    model = dslc.load(tmp_path / "any")
    assert model.manifest.context is None
    assert model(prompts(1, 70)).shape == (1, 70, 51)


def test_the_limit_of_a_checkpoint_is_the_one_compiled(tmp_path):
    import json

    config = {"max_position_embeddings": 48, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    names = {
        "hidden_size": 20, "vocab_size": 51, "num_hidden_layers": 2, "first_k_dense_replace": 1,
        "intermediate_size": 24, "num_attention_heads": 2, "q_lora_rank": 9, "kv_lora_rank": 7,
        "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | names))
    program = dslc.compile("dsv3", checkpoint=tmp_path)
    assert program.context is not None and program.context.positions == 4 * 48
