"""Weights as numpy reads them: the same numbers as torch's."""

import numpy as np
import torch

from backends.mlir.sampling import choose
from backends.mlir.weights import _e4m3, _store
from backends.pytorch import sampling


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
