"""Choosing tokens by the kernels of a compiled directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from backends.pytorch.sampling import refuse_nan, uniform
from backends.triton.patterns.tokens import DRAWN, GREEDY


class Sampler:
    """In the place of ``backends.pytorch.sampling.choose``, whose arguments it takes.

    Draws are float32 (there float64): one within about 1e-5 of the edge between two tokens may
    fall on the other one.
    """

    def __init__(self, kernels: ModuleType, names: Mapping[str, str]):
        self.greedy = getattr(kernels, names[GREEDY])
        self.drawn = getattr(kernels, names[DRAWN])

    def __call__(
        self,
        logits: Tensor,
        rows: Sequence[int],
        step: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        min_p: float = 0.0,
    ) -> Tensor:
        """int64 [sequences].

        Raises:
            InputError: logits are NaN.
        """
        if temperature == 0:
            tokens = self.greedy(logits)
        else:
            draws = [uniform(seed, row, step) for row in rows]
            same = [[value] * len(rows) for value in (temperature, top_p, min_p)]
            given: Any = torch.tensor([*same, draws], dtype=torch.float32).to(logits.device)
            # A draw below 1 may round to it; the last token's share ends there.
            tokens = self.drawn(logits, *given)
        refuse_nan(tokens < 0, rows, step)
        return tokens


def sampler_of(kernels: ModuleType, index: Mapping[str, Any]) -> Sampler | None:
    """None where the model has no kernels for that."""
    names = index.get("sampling")
    return Sampler(kernels, names) if names else None
