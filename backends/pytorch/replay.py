"""Decoding by CUDA graphs: a step of one token for each sequence, captured once and replayed.

A graph has fixed shapes and addresses. The number of sequences is rounded up, and what changes from
step to step (tokens, positions, slots) is copied into one buffer; everything else is made of it on
the device (``runtime/fixed.py``). A model whose step needs more than that is run as ever, and said
to be.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from backends.pytorch.asked import check_context
from backends.pytorch.runtime.cache import Cache
from backends.pytorch.runtime.fixed import FixedStep, NotFixed
from backends.pytorch.runtime.paged import PagedCache

if TYPE_CHECKING:
    from backends.pytorch.model import Model

WARM_UP = 2  # steps before a capture: kernels are loaded and tables made in them
FINE, COARSE = 8, 16  # sizes: powers of two up to the first, then multiples of the second


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]


def capture(run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
    """Capture what ``run`` launches; its result is at the same place after each replay."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@dataclass
class Decoding:
    """The step of so many sequences of one cache.

    Attributes:
        staged: int64 ``[3, size]``: tokens, positions and slots, where the graph reads them.
        version: the cache's, when it was captured.
    """

    model: Model
    held: ref[PagedCache]
    size: int
    steps: int = 0
    version: int = -1
    graph: Graph | None = None
    result: Tensor | None = None
    staged: Tensor = field(init=False)

    def __post_init__(self) -> None:
        with torch.inference_mode(False):  # written in steps inside and outside of that mode
            self.staged = torch.zeros(3, self.size, dtype=torch.int64, device=self.model.device)

    @property
    def cache(self) -> PagedCache:
        """The one that asks: what is captured does not keep a cache from being given up."""
        cache = self.held()
        assert cache is not None
        return cache

    def stage(self, tokens: Sequence[int], slots: Sequence[int]) -> None:
        """Copy the step's numbers into their buffer; the rows that are no sequence's go nowhere."""
        idle = self.size - len(tokens)
        positions = [self.cache.lengths[slot] for slot in slots]
        rows = torch.tensor(
            [
                [*tokens, *[0] * idle],
                [*positions, *[0] * idle],
                [*slots, *[self.cache.slots] * idle],
            ],
            dtype=torch.int64,
            device="cpu",
        )
        if self.staged.is_cuda:
            rows = rows.pin_memory()
        self.staged.copy_(rows, non_blocking=True)

    def run(self) -> Tensor:
        """What is captured: logits ``[size, vocab]`` of what is staged."""
        step = FixedStep(self.cache, self.staged, self.cache.table(self.staged.device))
        rows: Tensor = getattr(self.model.module, "main")(step, step.token)  # noqa: B009
        return rows


class Replays:
    """A model's captured steps.

    Attributes:
        enabled: set to False, steps are run one by one.
        reason: why this model's steps cannot be replayed; None while that is not known.
        capture: what captures; another one in tests, where there is no GPU.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.reason: str | None = None
        self.capture: Capture | None = None
        self._found: WeakKeyDictionary[Cache, dict[int, Decoding]] = WeakKeyDictionary()

    def forget(self) -> None:
        """Weights lie elsewhere: nothing that was captured is of use."""
        self._found.clear()

    def step(
        self, model: Model, tokens: Sequence[int], slots: Sequence[int], cache: Cache
    ) -> Tensor | None:
        """Run a step of one token for each of some slots; None: it has to be run otherwise.

        Returns:
            logits [slots, vocab].

        Raises:
            InputError, CacheFull: as ``Model.step``.
        """
        if not self.enabled or self.reason is not None or not isinstance(cache, PagedCache):
            return None
        if not tokens or (self.capture is None and model.device.type != "cuda"):
            return None
        found = self._found.setdefault(cache, {})
        size = padded(len(tokens))
        if size not in found:
            found[size] = Decoding(model, ref(cache), size)
        decoding = found[size]
        decoding.steps += 1
        if decoding.steps <= WARM_UP:
            return None
        longest = max(cache.lengths[slot] for slot in slots) + 1
        check_context(model.manifest, longest)
        model.make_room(cache, longest)
        for slot in slots:
            cache.claim(slot, cache.lengths[slot] + 1)
        cache.table(model.device)  # what it now says is told the device
        decoding.stage(tokens, slots)
        if not self._captured(decoding):
            return None
        assert decoding.graph is not None and decoding.result is not None
        decoding.graph.replay()
        for slot, token in zip(slots, tokens, strict=True):
            cache.remember(slot, cache.lengths[slot], [token])
        cache.commit(slots, [cache.lengths[slot] + 1 for slot in slots])
        return decoding.result[: len(tokens)].clone()

    def _captured(self, decoding: Decoding) -> bool:
        cache = decoding.cache
        if decoding.graph is not None and decoding.version == cache.version:
            return True
        decoding.graph = decoding.result = None
        try:
            with torch.no_grad():
                decoding.run()  # memory that is allocated once is, outside of the graph
                taken = (self.capture or capture)(decoding.run)
        except (NotFixed, RuntimeError) as problem:
            self.reason = str(problem).splitlines()[0]
            warnings.warn(f"decoding takes no CUDA graph: {self.reason}", stacklevel=4)
            return False
        decoding.graph, decoding.result = taken
        decoding.version = cache.version
        return True


def padded(sequences: int) -> int:
    """How many sequences a step that is replayed has room for."""
    size = 1
    while size < min(sequences, FINE):
        size *= 2
    return size if size >= sequences else -(-sequences // COARSE) * COARSE
