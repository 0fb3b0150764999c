"""llama.cpp on the same weights, through llama-cpp-python."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import torch

from dslc.bench.contestants import Absent, Round, Setup


class WithLlamaCpp:
    """The checkpoint as GGUF, in the dtype of its weights."""

    def __init__(self, setup: Setup):
        try:
            import llama_cpp
        except ImportError:
            raise Absent("llama-cpp-python is not installed") from None
        if setup.checkpoint is None:
            raise Absent("it needs a --checkpoint (dslc init writes one)")
        from dslc.bench.gguf_file import write

        file = setup.scratch / "model.gguf"
        context = setup.prompt + setup.new
        write(setup.checkpoint, file, context)
        try:
            self._model: Any = llama_cpp.Llama(
                str(file),
                n_ctx=context,
                n_batch=setup.prompt,
                n_ubatch=setup.prompt,
                n_threads=setup.threads,
                n_threads_batch=setup.threads,
                verbose=False,
            )
        except ValueError as error:
            raise Absent(f"it cannot load the file: {error}") from None
        self._library = llama_cpp
        self._vocab = self._model.n_vocab()
        self.about = f"llama-cpp-python {llama_cpp.__version__}"

    def round(self, prompt: Sequence[int], new: int) -> Round:
        self._model.reset()
        self._library.llama_memory_clear(self._library.llama_get_memory(self._model.ctx), True)
        times = [time.perf_counter()]
        tokens: list[int] = []
        given = list(prompt)
        for _ in range(new):
            self._model.eval(given)
            given = [self._likeliest()]
            tokens += given
            times.append(time.perf_counter())
        return Round(times[1] - times[0], times[-1] - times[1], tokens)

    def _likeliest(self) -> int:
        first = self._library.llama_get_logits_ith(self._model.ctx, -1)
        logits = ctypes.cast(first, ctypes.POINTER(ctypes.c_float * self._vocab)).contents
        return int(torch.frombuffer(logits, dtype=torch.float32).argmax())
