"""Multi-token prediction: row t of `model.mtp` predicts token t + 2, as in transformers."""

import warnings

import pytest
import torch

from oracle.cases import CASES, load, model, padded, prompts, reference, refused, rows
from oracle.checkpoint import write_checkpoint
from oracle.compare import assert_equal, assert_greedy
from oracle.reference import Reference


@pytest.mark.parametrize("case", CASES)
def test_mtp_logits(case):
    sequences = prompts(case, (23, 2, 9, 16))
    tokens, lengths = padded(sequences, junk=2)
    future = model(case).mtp(tokens, lengths)
    assert future.shape[:2] == (4, 22)
    assert torch.isfinite(future).all()
    theirs = reference(case).mtp_logits(sequences)
    for a, b in zip(rows(future, lengths - 1), theirs, strict=True):
        assert_equal(a, b, "MTP logits")


def test_mtp_without_lengths():
    sequences = prompts("yarn", (9, 9))
    future = model("yarn").mtp(torch.stack(sequences))
    assert_equal(future, torch.stack(reference("yarn").mtp_logits(sequences)))


def test_the_first_token_alone_predicts_nothing():
    assert model("plain").mtp(torch.tensor([[3], [5]])).shape == (2, 0, 97)


@pytest.fixture(scope="module")
def without_mtp(tmp_path_factory):
    """config.json announces the layer, but the file does not hold it: what transformers writes."""
    return write_checkpoint(tmp_path_factory.mktemp("mtp") / "c", seed=6, mtp=False)


def test_a_checkpoint_without_mtp_tensors_loads_and_says_so(without_mtp, capfd, caplog):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loaded = load("plain", without_mtp)
    said = capfd.readouterr().err + caplog.text + "".join(str(w.message) for w in warned)
    assert "mtp" in said.lower()
    assert said.count("\n") < 6, "one line will do, not one for each tensor"
    sequences = prompts("plain")
    tokens, lengths = padded(sequences)
    ref = Reference(without_mtp)
    for a, b in zip(rows(loaded(tokens, lengths), lengths), ref.logits(sequences), strict=True):
        assert_equal(a, b)
    out = loaded.generate(tokens, lengths, max_new_tokens=5)
    assert_greedy(ref, sequences[0], out[0], 5)
    assert not any(".layers.3." in name for name in loaded.state_dict())


def test_mtp_logits_are_refused_when_the_tensors_are_missing(without_mtp):
    loaded = load("plain", without_mtp)
    with refused("mtp"):
        loaded.mtp(torch.stack(prompts("plain", (9,))))
