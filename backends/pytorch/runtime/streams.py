"""A stream of its own for what ranks send each other: started now, waited for where it is read.

Work that is started runs one after the other in the order of its starts, which is the same on all
ranks, while whoever started it goes on. A thread does it: what an all-to-all needs to know first
(how many rows come) is exchanged there too, and nobody waits for it. On a GPU the same thread
queues kernels on a CUDA stream, ordered with the computing one by events.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Pending(Generic[T]):
    """What was started. ``wait`` has its result."""

    def __init__(
        self,
        work: Callable[[], T],
        device: torch.device | None,
        finish: Callable[[T], T] | None = None,
    ):
        self._work: Callable[[], T] | None = work
        self._finish = finish
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._result: T
        self._device = device
        # What the computing stream has queued so far is what the work may read.
        self._ready = torch.cuda.current_stream(device).record_event() if device else None
        self._arrived: torch.cuda.Event | None = None
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(self, stream: torch.cuda.Stream | None) -> None:
        """Do the work; called by the stream's thread."""
        assert self._work is not None
        try:
            with torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad):
                if stream is None:
                    self._result = self._work()
                else:
                    with torch.cuda.stream(stream):
                        if self._ready is not None:
                            stream.wait_event(self._ready)
                        self._result = self._work()
                        self._arrived = stream.record_event()
        except BaseException as error:
            self._error = error
        self._work = None  # lets go of what it has read
        self._done.set()

    def fail(self, error: BaseException) -> None:
        self._error, self._work = error, None
        self._done.set()

    def wait(self) -> T:
        """The result, once it is there.

        Raises:
            Exception: what the work, or work that was started before it, has raised.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        if self._arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrived)
            for tensor in _tensors(self._result):
                tensor.record_stream(current)
        if self._finish is not None:  # on the stream that computes
            self._result, self._finish = self._finish(self._result), None
        return self._result


class Stream:
    """Runs work in the order in which it is started, beside whoever starts it."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Pending[Any], torch.device | None]] = SimpleQueue()
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="communication", daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Is it the stream's own work that asks?"""
        return threading.current_thread() is self._thread

    def start(
        self,
        work: Callable[[], T],
        device: torch.device,
        finish: Callable[[T], T] | None = None,
    ) -> Pending[T]:
        """
        Args:
            device: of what the work reads.
            finish: what is made of the result by whoever waits for it, once.
        """
        on_gpu = device if device.type == "cuda" else None
        pending = Pending(work, on_gpu, finish)
        self._queue.put((pending, on_gpu))
        return pending

    def _run(self) -> None:
        streams: dict[torch.device, torch.cuda.Stream] = {}
        while True:
            pending, device = self._queue.get()
            if self._broken is not None:  # the others may be anywhere: nothing more is sent
                pending.fail(self._broken)
                continue
            if device is not None and device not in streams:
                torch.cuda.set_device(device)
                streams[device] = torch.cuda.Stream(device)
            pending.run(streams[device] if device is not None else None)
            self._broken = pending._error
            del pending


def _tensors(value: object) -> list[Tensor]:
    """The tensors that a result holds, for the allocator to know who reads them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    held = getattr(value, "__dict__", None)
    return [t for item in held.values() for t in _tensors(item)] if held else []


def arrived(x: T) -> Callable[[], T]:
    """A value in the place of one that is still on its way."""
    return lambda: x
