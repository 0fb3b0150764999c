"""FP8 products held to an independently fake-quantised transformers, fed what that was fed.

Every contraction gets the inputs that the reference recorded, every layer the reference's hidden
state; routing goes to the same experts whatever the rounding. Free-running logits are not
held to anything: on random weights a rounding changes a scale, and everything after it.
"""

from functools import cache

import pytest
import torch

from oracle.checkpoint import write_checkpoint
from oracle.fake_fp8 import patched
from oracle.reference import Reference

# No dim is a multiple of a tile; most are longer than one.
SHAPE = {
    "hidden_size": 203,
    "intermediate_size": 301,
    "moe_intermediate_size": 149,
    "num_attention_heads": 3,
    "q_lora_rank": 139,
    "kv_lora_rank": 131,
    "qk_nope_head_dim": 37,
    "qk_rope_head_dim": 14,
    "v_head_dim": 47,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
TOKENS = torch.arange(1, 90, 7)[:11]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fp8")


@cache
def models(folder):
    """Ours, the reference, and what its products and layers were given and gave."""
    import dslc

    path = write_checkpoint(folder / "checkpoint", mtp=False, constant_routing=True, **SHAPE)
    program = folder / "compiled"
    dslc.compile("dsv3", checkpoint=str(path), deploy="fp8").save(program)
    ours = dslc.load(program, checkpoint=path)
    reference = Reference(path)
    seen = patched(reference.model)
    layers = []
    for layer in reference.model.model.layers:
        layer.register_forward_hook(
            lambda _, given, out: layers.append(
                (given[0][0], out[0][0] if isinstance(out, tuple) else out[0])
            )
        )
    reference.logits([TOKENS])
    return ours, seen, layers


def distance(a, b):
    return float((a.detach().double() - b.double()).norm() / b.double().norm())


def test_each_contraction(folder):
    """Within 4.5% of its float32 value, and within 1e-3 of the reference's."""
    from backends.pytorch.runtime import quantize, scaled_linear
    from backends.pytorch.runtime.fp8 import Coding

    ours, seen, _ = models(folder)
    named = dict(ours.named_parameters())
    assert (
        len(seen) == 3 * 4 + 3 + 2 * 3 + 2 * 3 * 2
    )  # attention, dense, shared, two experts picked
    for name, runs in seen.items():
        weight = named[name]
        coding = Coding(weight.coding.format, 1, 128)
        for x, exact, theirs in runs:
            found = scaled_linear(quantize(x, coding), weight, promote=128)
            assert distance(found, theirs) <= 1e-3, name
            assert distance(found, x.double() @ exact.double().T) <= 0.045, name


def test_each_layer_fed_the_references_input(folder):
    ours, _, layers = models(folder)
    found = []
    for number, layer in enumerate(ours.module.layers):
        given = layers[number][0]
        layer.register_forward_pre_hook(
            lambda _, args, given=given: (args[0], given.clone(), *args[2:])
        )
        layer.register_forward_hook(lambda _, args, out: found.append(out.detach()))
    with torch.no_grad():
        ours(TOKENS[None])
    assert len(found) == len(layers) == 3
    for number, (out, (given, theirs)) in enumerate(zip(found, layers, strict=True)):
        assert distance(out - given, theirs - given) <= 5e-3, number  # without what is carried past


def test_the_reference_does_quantise(folder):
    """An unquantised layer is further away: the bound above holds something."""
    _, _, layers = models(folder)
    exact = Reference(folder / "checkpoint")
    plain = []
    for layer in exact.model.model.layers[:1]:
        layer.register_forward_hook(
            lambda _, given, out: plain.append(out[0][0] if isinstance(out, tuple) else out[0])
        )
    exact.logits([TOKENS])
    given, theirs = layers[0]
    assert distance(plain[0] - given, theirs - given) > 1e-2
