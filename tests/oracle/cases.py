"""The checkpoints that our DeepSeek-V3 is held to: each bends the architecture somewhere else.

Checkpoints, references and compiled programs are made once and shared by all tests of a process.
"""

import atexit
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oracle.checkpoint import write_checkpoint
from oracle.reference import Reference

ROOT = Path(__file__).resolve().parents[2]

YARN = {  # as published
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

CASES: dict[str, dict] = {
    "plain": {},
    # With seven frequencies the ramp of the published YaRN has an inside.
    "yarn": {
        "rope_scaling": YARN,
        "qk_rope_head_dim": 14,
        "rope_theta": 10000,
        "max_position_embeddings": 163840,
    },
    # mscale and mscale_all_dim differ, so rotated values grow as well as the softmax scale; prompts
    # outgrow the trained length.
    "yarn_v5": {
        "form": "v5",
        "sharded": True,
        "rope_theta": 500.0,
        "qk_rope_head_dim": 10,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 7,
            "original_max_position_embeddings": 16,
            "beta_fast": 3,
            "beta_slow": 0.25,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
        },
    },
    # Without mscale_all_dim the growth moves from the softmax scale to the rotated values; here the
    # ramp is a step.
    "yarn_bare": {
        "rope_scaling": {"type": "yarn", "factor": 3, "original_max_position_embeddings": 4}
    },
    "one_group": {
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 7,
        "n_shared_experts": 1,
        "form": "v5",
    },
    "one_expert_each": {
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "n_shared_experts": 3,
        "topk_group": 1,
    },
    "all_groups_open": {"topk_group": 4, "num_experts_per_tok": 12, "sharded": True},
    "all_dense": {"first_k_dense_replace": 3},
    "none_dense": {
        "first_k_dense_replace": 0,
        "num_hidden_layers": 2,
        "routed_scaling_factor": 1.0,
    },
    "no_query_rank": {"q_lora_rank": None, "norm_topk_prob": False},
    # The norms inside the attention keep 1e-6 whatever rms_norm_eps says.
    "large_eps": {"rms_norm_eps": 0.5, "num_hidden_layers": 2},
    # Ranks above the heads' dims: here the absorbed order is the dearer one for longer.
    "wide_ranks": {
        "num_attention_heads": 2,
        "kv_lora_rank": 37,
        "q_lora_rank": 41,
        "v_head_dim": 3,
        "qk_rope_head_dim": 2,
        "hidden_size": 23,
    },
}

_folder = Path(tempfile.mkdtemp(prefix="dslc-oracle-"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)


@cache
def checkpoint(case: str) -> Path:
    return write_checkpoint(_folder / case, seed=sorted(CASES).index(case), **CASES[case])


@cache
def reference(case: str) -> Reference:
    return Reference(checkpoint(case))


def prompts(case: str, lengths: tuple[int, ...] = (23, 1, 9, 16)) -> list[Tensor]:
    """Random sequences, the same for the same case and lengths."""
    vocab = reference(case).model.config.vocab_size
    generator = torch.Generator().manual_seed(1 + sorted(CASES).index(case))
    return [torch.randint(vocab, (n,), generator=generator) for n in lengths]


@cache
def program(case: str):
    """The model that ships, compiled for the dims of the case's checkpoint, as saved to disk."""
    import dslc

    compiled = _folder / f"{case}-compiled"
    dslc.compile("dsv3", checkpoint=str(checkpoint(case))).save(str(compiled))
    return compiled


def load(case: str, source: Path | None = None, dtype: str = "float32"):
    """A fresh copy of the compiled model, with the weights of `source` or of its own checkpoint."""
    import dslc

    weights = str(source or checkpoint(case))
    return dslc.load(str(program(case)), checkpoint=weights, device="cpu", dtype=dtype)


@cache
def model(case: str):
    """The compiled model of a case in float32; tests share it, so they leave its weights alone."""
    return load(case)


def padded(sequences: list[Tensor], junk: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences as [batch, time] with `junk` on the right, and their lengths."""
    lengths = torch.tensor([len(s) for s in sequences])
    batch = torch.full((len(sequences), int(lengths.max())), junk)
    for row, sequence in zip(batch, sequences, strict=True):
        row[: len(sequence)] = sequence
    return batch, lengths


def rows(batch: Tensor, lengths: Tensor) -> list[Tensor]:
    """The valid rows of each sequence of a padded result."""
    return [row[:n] for row, n in zip(batch, lengths.tolist(), strict=True)]


@contextmanager
def refused(*mentioned: str):
    """The block is refused with an error meant for the user, which mentions these, in any case."""
    with pytest.raises(Exception) as caught:
        yield
    ours = type(caught.value).__module__.split(".")[0] in {"dsl", "compiler", "backends", "dslc"}
    assert ours or type(caught.value) is ValueError, f"not an error for users: {caught.value!r}"
    for word in mentioned:
        assert word.lower() in str(caught.value).lower(), f"{word!r} is not in: {caught.value}"
    assert len(str(caught.value)) < 2000


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `dslc` with these arguments, in a process of its own."""
    start = [sys.executable, "-c", "from dslc.cli import main; main()"]
    return subprocess.run(
        [*start, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
