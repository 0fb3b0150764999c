"""Modules that the tests share: each architecture is compiled once, at odd small sizes."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

import dslc
from backends.mlir.model import Model, load

ODD = {
    "dsv3": {
        "hidden": 36, "vocab": 97, "layers": 4, "dense": 1, "ffn": 44, "heads": 3, "q_rank": 14,
        "kv_rank": 10, "rope": 6, "nope": 5, "value": 7, "experts": 6, "groups": 3,
        "open_groups": 2, "per_token": 3, "expert_ffn": 9, "shared_experts": 2,
    },
    "llama3": {
        "vocab": 61, "layers": 3, "ffn": 52, "hidden": 40, "heads": 6, "kv_heads": 3, "head_dim": 6,
    },
    "qwen3_moe": {"vocab": 83, "layers": 3, "hidden": 35, "heads": 3, "kv_heads": 1},
    "qwen2_5": {"vocab": 71, "layers": 2, "hidden": 36, "heads": 6, "ffn": 50},
    "mixtral": {
        "vocab": 67, "layers": 2, "hidden": 36, "heads": 6, "kv_heads": 2, "expert_ffn": 34,
        "experts": 5,
    },
    "dsv2": {
        "vocab": 89, "layers": 2, "hidden": 38, "dense": 0, "heads": 3, "q_rank": 14,
        "kv_rank": 10, "rope": 6, "nope": 5, "value": 7, "experts": 6, "n_group": 3,
        "topk_group": 2, "per_token": 3, "expert_ffn": 11,
    },
    "dsv3_2": {
        "vocab": 79, "layers": 2, "hidden": 34, "dense": 0, "heads": 3, "q_rank": 14,
        "kv_rank": 10, "rope": 6, "nope": 5, "value": 7, "experts": 6, "groups": 3,
        "open_groups": 2, "per_token": 3, "expert_ffn": 9, "index_topk": 4, "index_heads": 3,
        "index_width": 10,
    },
}  # fmt: skip

# In tiles of 128 x 128: matrices of one tile, of two, and with partial ones at their edges, packed
# and not.
CODED = {
    "dsv3": {
        "hidden": 256, "vocab": 97, "layers": 2, "dense": 0, "heads": 3, "q_rank": 144,
        "kv_rank": 40, "rope": 6, "nope": 5, "value": 7, "experts": 6, "groups": 3,
        "open_groups": 2, "per_token": 3, "expert_ffn": 160, "shared_experts": 1,
    },
}  # fmt: skip


def sizes(name: str, deploy: str | None) -> dict[str, int]:
    return CODED[name] if deploy else ODD[name]


@cache
def folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="dslc-mlir-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@cache
def shared() -> Path:
    """A folder that all workers of a test run have in common."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return folder()
    return Path(tempfile.gettempdir()) / f"dslc-mlir-{run}"


@cache
def compiled(name: str, dtype: str = "float32", deploy: str | None = None) -> Path:
    """A directory that the MLIR backend wrote, whichever worker needs it first."""
    where = shared() / f"{name}-{dtype}-{deploy}"
    where.parent.mkdir(exist_ok=True)
    with open(where.parent / f"{where.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not where.exists():
            chosen = sizes(name, deploy)
            program = dslc.compile(name, dims="small", set=chosen, backend="mlir", deploy=deploy)
            program.save(where, dtype)
    return where


@cache
def model(name: str, dtype: str = "float32", deploy: str | None = None) -> Model:
    return load(compiled(name, dtype, deploy), seed=0)


@cache
def reference(name: str, dtype: str = "float32", deploy: str | None = None) -> torch.nn.Module:
    """The same model, with the same random weights, by the PyTorch backend."""
    where = folder() / f"{name}-torch-{dtype}-{deploy}"
    dslc.compile(name, dims="small", set=sizes(name, deploy), deploy=deploy).save(where)
    return dslc.load(where, seed=0, dtype=dtype)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """What ``interface.md`` compares fp32 logits by: at most 1e-5."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
