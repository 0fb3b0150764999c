"""Weights as numpy reads them: the same numbers as torch's."""

from pathlib import Path

import numpy as np
import pytest
import torch

import dslc
from backends.mlir.archive import Places, weights_of
from backends.mlir.artifact import Layout, described
from backends.mlir.module import lower
from backends.mlir.sampling import choose
from backends.mlir.weights import _e4m3, _store
from backends.pytorch import sampling
from compiler.tensors import caches
from dslc.cli import run


def test_every_byte_of_e4m3() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(_e4m3(), expected)


def test_to_bfloat16_the_nearest_and_ties_to_even() -> None:
    values = np.random.default_rng(0).normal(size=4097).astype(np.float32)
    halves = (np.arange(1 << 10, dtype=np.uint32) << 15).view(np.float32)  # exactly between two
    some = np.concatenate([values, halves, [np.inf, -np.inf, 0.0, -0.0, 3.4e38]])
    into = np.empty(some.shape, np.uint16)
    _store(some.astype(np.float32), into)
    expected = torch.tensor(some, dtype=torch.float32).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(into, expected)


def test_draws_are_those_of_the_pytorch_backend() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 37)).astype(np.float32)
    for temperature, top_p, min_p in (
        (0.0, 1.0, 0.0),
        (0.7, 1.0, 0.0),
        (1.3, 0.6, 0.0),
        (1, 1, 0.1),
    ):
        for step in range(4):
            rows = [3, 0, 7, 1, 2]
            found = choose(logits, rows, step, temperature, top_p, 11, min_p)
            expected = sampling.choose(
                torch.tensor(logits), rows, step, temperature, top_p, 11, min_p
            )
            assert found.tolist() == expected.tolist()


def opened(layout: Layout, path: Path) -> dict[str, np.ndarray]:
    """The weights of an archive."""
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    places = Places.of(layout)
    return places.arrays(layout, np.memmap(path, np.uint8, "r", begin, (places.size,)))


@pytest.mark.parametrize("deploy", [None, "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_what_the_pytorch_backend_reads(
    deploy: str | None, dtype: str, tmp_path: Path
) -> None:
    """Stored in bfloat16, or in FP8 with scales: the same numbers, stacked."""
    stored = tmp_path / "checkpoint"
    extra = ["--deploy", deploy] if deploy else []
    assert run(["init", str(stored), "dsv3", "--dims", "small", *extra]) == 0
    program = dslc.compile("dsv3", checkpoint=stored)
    program.save(tmp_path / "torch")
    theirs = dslc.load(tmp_path / "torch", checkpoint=stored, dtype=dtype)
    elements = {"float32": "f32", "bfloat16": "bf16"}
    compiled = program.compiled
    module = lower(compiled.program, caches(compiled.after("elaborate")), elements[dtype])
    layout = described(module, dtype)
    arrays = opened(layout, weights_of(layout, theirs.manifest, tmp_path / "m", stored))
    expected = theirs.state_dict()
    assert {bool(row.lanes) for row in layout.weights.values()} == {True, False}
    for key, pattern in module.parameters.items():
        stack = arrays[key]
        if layout.weights[key].lanes:  # packed: [.., rows / lanes, columns, lanes]
            stack = stack.swapaxes(-1, -2)
        each = zip(pattern.tensors(), stack.reshape(len(pattern), -1), strict=True)
        for tensor, found in each:
            wide = found.astype(np.uint32) << 16 if found.dtype == np.uint16 else found
            values = expected[tensor.name].float().numpy().reshape(-1)
            np.testing.assert_array_equal(wide.view(np.float32), values)
