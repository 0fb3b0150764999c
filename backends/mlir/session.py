"""A compiled module and its weights, run by IREE: steps over [batch, time], with caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.mlir.artifact import Kept
from backends.pytorch.memory import require

WIDTHS = {"f32": 4, "bf16": 2}

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


class Session:
    """The functions of one module.

    Args:
        module: the bytes of the .vmfb file.
        parameters: the stacked weights by name, at multiples of 64 bytes (others are copied), or
            the path of a safetensors file of them, which is mapped.
    """

    def __init__(
        self,
        module: bytes,
        parameters: Mapping[str, NDArray[Any]] | Path,
        caches: Sequence[Kept],
        name: str,
    ):
        from iree import runtime

        self.caches = tuple(caches)
        self._runtime = runtime
        config = runtime.Config("local-task")
        self._device = config.device
        index = runtime.ParameterIndex()
        if isinstance(parameters, Path):
            index.load(str(parameters), format="safetensors")
        else:
            for key, array in parameters.items():
                index.add_buffer(key, array)
        self.mapped = parameters if isinstance(parameters, Path) else None
        self._held = parameters  # the buffers are the module's memory
        instance = config.vm_instance
        weights = runtime.create_io_parameters_module(instance, index.create_provider("model"))
        hal = runtime.create_hal_module(instance, config.device)
        compiled = runtime.VmModule.copy_buffer(instance, module)
        self._context = runtime.SystemContext(config=config, vm_modules=(weights, hal, compiled))
        if name not in self._context.modules:
            raise ValueError(f"it holds no module '{name}'")
        self._module = self._context.modules[name]

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return Cache(self, batch, capacity)

    def step(self, tokens: Tokens, counts: Sequence[int], cache: Cache, last: bool) -> Logits:
        """Run a step.

        Args:
            tokens: [batch, time], padded on the right.
            counts: how many of them count.
            last: only the last row of each sequence.

        Returns:
            [batch, time or 1, vocab]; rows that do not count are unspecified.
        """
        batch, time = tokens.shape
        past = np.array(cache.lengths, dtype=np.int64)
        if batch == time == 1 and cache.lengths[0] and counts == [1]:
            results = self._module["decode"](tokens, past, *cache.arrays)
        else:
            count = np.array(counts, dtype=np.int64)
            ends = np.arange(batch) * time + np.maximum(count, 1) - 1
            rows = ends if last else np.arange(batch * time)
            most = max(cache.lengths, default=0)
            results = self._module["prefill"](tokens, past, count, rows, most, *cache.arrays)
        # IREE gives one result, of a model that caches nothing, by itself.
        logits, *cache.arrays = results if isinstance(results, list | tuple) else [results]
        cache.lengths = [n + c for n, c in zip(cache.lengths, counts, strict=True)]
        # A copy: what IREE gives is its own memory, which a later step uses again.
        found = np.array(logits.to_host())
        return found.reshape(batch, 1 if last else time, found.shape[-1])


class Cache:
    """What the sequences of a batch have cached, in the device's memory."""

    def __init__(self, session: Session, batch: int, capacity: int):
        runtime = session._runtime
        self.lengths = [0] * batch
        self.capacity = capacity
        needed = sum(
            prod(row.arrays) * batch * capacity * prod(row.own) * WIDTHS[row.element]
            for row in session.caches
        )
        require(f"a cache of {batch} x {capacity} positions", needed, "cpu")
        types: dict[str, Any] = {"f32": np.float32, "bf16": _bfloat16()}
        self.arrays: list[Any] = [
            runtime.asdevicearray(
                session._device,
                np.zeros((*row.arrays, batch, capacity, *row.own), types[row.element]),
            )
            for row in session.caches
        ]


def _bfloat16() -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16
