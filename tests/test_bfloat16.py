"""bfloat16: as near to float32 as transformers' own bfloat16.

Rounding changes which experts a token goes to, and then everything after it. So these checkpoints
have router biases so far apart that routing is the same in both precisions.
"""

from functools import cache

import pytest
import torch

from oracle.cases import prompts
from oracle.checkpoint import write_checkpoint
from oracle.reference import Reference

SHAPES = {
    "model": {"hidden_size": 61, "num_hidden_layers": 4, "qk_nope_head_dim": 13, "v_head_dim": 17},
    "dense layer": {"num_hidden_layers": 1, "first_k_dense_replace": 1, "hidden_size": 61},
    "MoE layer": {"num_hidden_layers": 1, "first_k_dense_replace": 0, "hidden_size": 61},
}
SEEDS = range(5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bfloat16")


@cache
def compiled(folder, shape, seed):
    """A checkpoint of this shape and our program, compiled once for all its seeds."""
    import dslc

    path = folder / f"{shape}-{seed}"
    write_checkpoint(path, seed=seed, dtype=torch.bfloat16, constant_routing=True, **SHAPES[shape])
    program = folder / f"{shape}-compiled"
    if not program.exists():
        dslc.compile("dsv3", checkpoint=str(path)).save(str(program))
    return dslc.load(str(program), checkpoint=str(path), device="cpu", dtype="bfloat16"), path


def distance(a, b):
    return float((a.detach().float() - b).norm() / b.norm())


@pytest.mark.parametrize("feeding", ["prefill", "token by token"])
def test_error_is_at_most_a_fifth_above_transformers_own(folder, feeding):
    [tokens], ratios = prompts("plain", (48,)), []
    for seed in SEEDS:
        model, path = compiled(folder, "model", seed)
        [exact], [theirs] = (
            Reference(path, d).logits([tokens]) for d in (torch.float32, torch.bfloat16)
        )
        if feeding == "prefill":
            ours = model(tokens[None])[0]
        else:
            cache = model.new_cache(1)
            ours = torch.cat([model(t[None, None], cache=cache)[0] for t in tokens])
        ratios.append(distance(ours, exact) / distance(theirs, exact))
    assert torch.tensor(ratios).median() <= 1.2, ratios


@pytest.mark.parametrize("shape", ["dense layer", "MoE layer"])
def test_one_layer_is_within_two_percent(folder, shape):
    [tokens] = prompts("plain", (48,))
    model, path = compiled(folder, shape, 0)
    [exact] = Reference(path).logits([tokens])
    assert distance(model(tokens[None])[0], exact) <= 2e-2


def test_parameters_are_bfloat16_and_router_biases_float32(folder):
    model, _ = compiled(folder, "model", 0)
    for name, tensor in model.state_dict().items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if bias else torch.bfloat16), name


def test_a_float32_checkpoint_is_rounded_on_load_and_back_again_it_is_not(folder, tmp_path):
    """float32 weights in bfloat16 are rounded; bfloat16 weights in float32 are what they were."""
    import dslc
    from oracle.checkpoint import read_tensors

    _, path = compiled(folder, "dense layer", 0)
    program = str(folder / "dense layer-compiled")
    stored = read_tensors(path)
    wide = dslc.load(program, checkpoint=str(path), dtype="float32").state_dict()
    assert all(torch.equal(t, stored[n].float()) for n, t in wide.items())
    other = write_checkpoint(tmp_path / "c", seed=1, **SHAPES["dense layer"])
    exact = read_tensors(other)
    narrow = dslc.load(program, checkpoint=str(other), dtype="bfloat16").state_dict()
    for name, tensor in narrow.items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
