"""The compiled model itself."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from backends.pytorch.load import load
from dslc.bench.contestants import Round, Setup


class Ours:
    """A compiled directory, with the step of one token as it was compiled."""

    def __init__(self, setup: Setup):
        torch.set_num_threads(setup.threads)
        notes: list[str] = []
        self._model = load(setup.directory, setup.checkpoint, dtype=setup.dtype, note=notes.append)
        how = "compiled ahead of time" if self._model.decodes_ahead else "model.py"
        self.about = f"torch {torch.__version__}, decode {how}"

    def round(self, prompt: Sequence[int], new: int) -> Round:
        times: list[float] = []
        started = time.perf_counter()
        out = self._model.generate(
            torch.tensor([list(prompt)]),
            max_new_tokens=new,
            on_token=lambda step, token: times.append(time.perf_counter()),
        )
        tokens = out[0][len(prompt) :].tolist()
        return Round(times[0] - started, times[-1] - times[0], tokens)
