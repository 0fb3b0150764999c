"""Gradients through our model, of every tensor of the checkpoint, equal transformers' to 1e-4."""

import pytest
import torch
import torch.nn.functional as F

from oracle.cases import load, padded, prompts, reference
from oracle.compare import assert_equal


def gradients(model):
    """Gradients by the checkpoint's names, however the model stores its parameters: the state dict
    of a model whose weights are its gradients."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
    return {n: t for n, t in model.state_dict().items() if not n.endswith("correction_bias")}


def assert_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    nonzero = 0
    for name, gradient in theirs.items():
        assert_equal(ours[name], gradient, name, tolerance=1e-4)
        nonzero += bool(gradient.any())
    assert nonzero > 0.7 * len(theirs)


def without_mtp(named):
    last = max(int(n.split(".")[2]) for n in named if n.startswith("model.layers."))
    return {n: t for n, t in named.items() if f"model.layers.{last}." not in n}


@pytest.mark.parametrize("case", ["plain", "yarn", "no_query_rank", "one_expert_each"])
def test_gradients_of_the_main_model(case):
    [tokens] = prompts(case, (23,))
    model = load(case).requires_grad_(True)
    F.cross_entropy(model(tokens[None])[0, :-1], tokens[1:]).backward()
    ours = gradients(model)
    assert all(not t.any() for n, t in ours.items() if n not in without_mtp(ours))
    assert_gradients(without_mtp(ours), reference(case).gradients(tokens))


@pytest.mark.parametrize("case", ["plain", "yarn_v5"])
def test_gradients_through_mtp(case):
    """The second prediction's loss reaches all of the main model but its final use of the head."""
    [tokens] = prompts(case, (23,))
    model = load(case).requires_grad_(True)
    F.cross_entropy(model.mtp(tokens[None])[0, :-1], tokens[2:]).backward()
    assert_gradients(gradients(model), reference(case).gradients(tokens, mtp=True))


def test_padding_has_no_gradient():
    """A ragged batch gives the sum of what its sequences give alone."""
    sequences = prompts("plain", (17, 5))
    tokens, lengths = padded(sequences, junk=8)
    model = load("plain").requires_grad_(True)
    logits = model(tokens, lengths)
    sum(F.cross_entropy(logits[i, : len(s) - 1], s[1:]) for i, s in enumerate(sequences)).backward()
    one, other = (reference("plain").gradients(s) for s in sequences)
    assert_gradients(without_mtp(gradients(model)), {n: one[n] + other[n] for n in one})
