"""Generation: the greedy tokens are transformers', alone, in batches and from the command line."""

import json

import pytest
import torch

from oracle.cases import CASES, command, model, padded, prompts, reference
from oracle.checkpoint import write_checkpoint
from oracle.compare import assert_greedy
from oracle.reference import Reference

NEW = 12


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_of_a_ragged_batch(case):
    sequences = prompts(case)
    tokens, lengths = padded(sequences, junk=3)
    out = model(case).generate(tokens, lengths, max_new_tokens=NEW)
    assert isinstance(out, list) and len(out) == len(sequences)
    for prompt, output in zip(sequences, out, strict=True):
        assert_greedy(reference(case), prompt, output, NEW)


def test_without_lengths_the_result_is_one_tensor():
    sequences = prompts("yarn", (9, 9, 9))
    out = model("yarn").generate(torch.stack(sequences), max_new_tokens=NEW)
    assert out.shape == (3, 9 + NEW) and out.dtype == torch.int64
    for prompt, output in zip(sequences, out, strict=True):
        assert_greedy(reference("yarn"), prompt, output, NEW)


def test_end_of_sequence_ends_that_sequence_only():
    sequences = prompts("plain")
    tokens, lengths = padded(sequences)
    full = [o.tolist() for o in model("plain").generate(tokens, lengths, max_new_tokens=NEW)]
    eos = full[2][len(sequences[2]) + 3]
    out = model("plain").generate(tokens, lengths, max_new_tokens=NEW, eos=eos)
    ended = 0
    for prompt, expected, output in zip(sequences, full, out, strict=True):
        new = expected[len(prompt) :]
        kept = new.index(eos) + 1 if eos in new else NEW
        assert output.tolist() == expected[: len(prompt) + kept]
        ended += kept < NEW
    assert 0 < ended < len(sequences)


def test_each_token_is_told_as_it_comes():
    sequences, told = prompts("plain", (9, 9)), []

    def on_token(step, tokens):
        assert tokens.shape == (2,) and tokens.dtype == torch.int64
        told.append((step, tokens.clone()))

    out = model("plain").generate(torch.stack(sequences), max_new_tokens=NEW, on_token=on_token)
    assert [step for step, _ in told] == list(range(NEW))
    assert torch.equal(torch.stack([tokens for _, tokens in told], 1), out[:, 9:])


def test_sampling_follows_its_seed():
    tokens = torch.stack(prompts("plain", (9, 9)))

    def sample(seed, **how):
        return model("plain").generate(tokens, max_new_tokens=NEW, seed=seed, **how).tolist()

    assert sample(1, temperature=1.0) == sample(1, temperature=1.0)
    assert sample(1, temperature=1.0) != sample(2, temperature=1.0)
    greedy = sample(0)
    assert sample(1, temperature=1.0) != greedy
    assert sample(1, temperature=1.0, top_p=1e-6) == greedy
    assert sample(1, temperature=1e-6) == greedy


def test_sampled_tokens_are_distributed_as_the_logits_say():
    """The first sampled token of 4,000 copies of a prompt, against softmax at that temperature."""
    [prompt] = prompts("plain", (3,))
    [logits] = reference("plain").logits([prompt])
    expected = torch.softmax(logits[-1] / 0.7, -1)
    out = model("plain").generate(
        prompt.expand(4000, -1), max_new_tokens=1, temperature=0.7, seed=3
    )
    counted = torch.bincount(out[:, -1], minlength=97) / 4000
    assert (counted - expected).abs().max() < 5 * (
        expected.max() * (1 - expected.max()) / 4000
    ) ** 0.5
    nucleus = model("plain").generate(
        prompt.expand(500, -1), max_new_tokens=1, temperature=0.7, top_p=0.5, seed=3
    )
    ranked = expected.sort(descending=True)
    kept = int((ranked.values.cumsum(0) < 0.5).sum()) + 1
    assert set(nucleus[:, -1].tolist()) <= set(ranked.indices[:kept].tolist())


@pytest.fixture(scope="module")
def from_the_command_line(tmp_path_factory):
    """A checkpoint, compiled as a user would."""
    folder = tmp_path_factory.mktemp("command")
    path = write_checkpoint(folder / "checkpoint", seed=4, eos_token_id=None)
    done = command("compile", "dsv3", "--checkpoint", path, "-o", folder / "compiled")
    assert done.returncode == 0, done.stderr
    return path, folder / "compiled"


def test_run_prints_the_greedy_tokens(from_the_command_line):
    path, compiled = from_the_command_line
    sequences = prompts("plain", (7, 3))
    given = [a for s in sequences for a in ("--tokens", ",".join(map(str, s.tolist())))]
    done = command("run", compiled, "--checkpoint", path, *given, "--max-new-tokens", NEW, "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed.keys() >= {"tokens", "text", "timing"} and printed["text"] is None
    assert printed["timing"].keys() == {"prefill_tokens_per_second", "decode_tokens_per_second"}
    for prompt, output in zip(sequences, printed["tokens"], strict=True):
        assert_greedy(Reference(path), prompt, torch.tensor(output), NEW)
