"""What this machine reaches, measured: for ``dslc calibrate``. Needs torch.

As many processes as the cluster shall have devices measure at the same time, since that is how
ranks run: they share memory and clocks. Each class of kernels is measured as compiled programs run
it, on weights that do not lie in a cache, so that a plan's rates are those of what it plans.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from statistics import mean, median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from backends.pytorch.runtime.attention import attention
from backends.pytorch.runtime.step import Step

SIDE = 1024  # of matrices on a CPU; on a GPU four times as large
ROWS = 512  # of tokens that are multiplied; on a GPU eight times as many
FEW = 64  # rows of a block that some tokens picked; on a GPU eight times as many
WEIGHTS = 16  # matrices that take turns
LINK_BYTES = 8 << 20
LINK_ROUNDS = 10
SECONDS = 0.2  # each figure
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def devices() -> tuple[str, int]:
    """What there is to measure, and as how many devices: each GPU, or two halves of a CPU."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    return "cpu", min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Found:
    """A figure: its name in a device's table, its value in base units, how it was measured."""

    name: str
    value: float
    how: str

    @property
    def written(self) -> str:
        """The value with its unit, as a cluster file has it."""
        if self.name.startswith("latency") or self.name == "floor":
            return f"{self.value * 1e6:.3g} us"
        if self.name == "memory":
            return f"{self.value / 1e9:.1f} GB"
        if self.name == "sms":
            return f"{self.value:.0f}"
        if self.name.endswith(("memory]", "scale_up]", "scale_out]")):
            return f"{self.value / 1e9:.4g} GB/s"
        return f"{self.value / 1e9:.4g} GFLOPS"


def machine(device: str, ranks: int) -> tuple[str, list[Found]]:
    """The device's name and its figures, the mean of what the ranks found.

    Args:
        device: cpu or cuda. ``ranks``: processes that measure together.

    Raises:
        RuntimeError: a process ended before it had measured.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=_rank, args=(r, ranks, port, device, queue)) for r in range(ranks)
    ]
    for worker in workers:
        worker.start()
    try:
        found = [_next(queue, workers) for _ in workers]
    finally:
        for worker in workers:
            worker.join(timeout=10)
            if worker.is_alive():
                worker.terminate()
    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    rows = [
        Found(f.name, mean(one[i].value for one in found), f.how) for i, f in enumerate(found[0])
    ]
    return name, [*_known(device, ranks), *_peaks(rows)]


def _next(queue: multiprocessing.Queue[list[Found]], workers: Sequence[BaseProcess]) -> list[Found]:
    from queue import Empty

    while True:
        try:
            return queue.get(timeout=1)
        except Empty:
            if any(worker.exitcode not in (None, 0) for worker in workers):
                raise RuntimeError("a process ended before it had measured") from None


def _known(device: str, ranks: int) -> Iterator[Found]:
    """What the system says."""
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        yield Found("memory", about.total_memory, "as the driver says")
        yield Found("sms", about.multi_processor_count, "as the driver says")
    else:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Found("memory", whole / ranks, f"as the system says, shared by {ranks}")


def _peaks(rows: list[Found]) -> list[Found]:
    """A peak is what was reached at best: no rate is above it."""
    out = []
    for row in rows:
        if row.name.startswith("peak["):
            same = row.name.removeprefix("peak[")
            best = max(
                r.value
                for r in rows
                if r.name == row.name or r.name.endswith(f", {same}") or r.name == f"rate[{same}"
            )
            row = Found(row.name, best * 1.001, row.how)
        out.append(row)
    return out


# -- in each process -------------------------------------------------------------------------------


def _rank(
    rank: int, ranks: int, port: int, device: str, queue: multiprocessing.Queue[list[Found]]
) -> None:
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    else:
        torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    if "GLOO_SOCKET_IFNAME" not in os.environ and os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=ranks)
    with torch.inference_mode():
        found = [*_Measuring(device).figures()]
        if ranks > 1:
            found += _link(device, ranks)
    queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


class _Measuring:
    def __init__(self, device: str):
        self.device = device
        self.factor = 8 if device == "cuda" else 1
        self.side = SIDE * (4 if device == "cuda" else 1)

    def figures(self) -> Iterator[Found]:
        side, rows, few = self.side, ROWS * self.factor, FEW * self.factor
        version = f"torch {torch.__version__}"
        for dtype, name in NAMES.items():
            a = self.random(side, side, dtype=dtype)
            taken = self.typical(partial(torch.matmul, a, a))
            yield Found(
                f"peak[{name}]", 2 * side**3 / taken, f"{side} x {side} x {side}, {version}"
            )
            weights = [self.random(side, side, dtype=dtype) for _ in range(WEIGHTS)]
            for kernel, count in (("gemm", rows), ("grouped_gemm", few)):
                taken = self.products(weights, count)
                how = f"{count} rows times {WEIGHTS} matrices of {side} x {side}, in turn"
                yield Found(f"rate[{kernel}, {name}]", 2 * count * side**2 / taken, how)
            taken = self.attention(dtype)
            flops = 2 * ROWS**2 * 16 * (96 + 64) / 2
            how = f"causal, {ROWS} positions, 16 heads of 96/64, as compiled programs run it"
            yield Found(f"rate[attention, {name}]", flops * self.factor / taken, how)
            if name == "f32":
                taken = self.products(weights, 1)
                how = f"1 row times {WEIGHTS} matrices of {side} x {side}, in turn"
                yield Found("rate[gemm, memory]", weights[0].nbytes / taken, how)
        yield from self.memory()

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def typical(self, work: Callable[[], object]) -> float:
        """The median time of ``work`` within some tenths of a second, after one run to warm up;
        ranks begin together. Not the best: a step of a model meets what else a machine does."""
        work()
        self.wait()
        dist.barrier()
        times: list[float] = []
        end = time.perf_counter() + SECONDS
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return median(times)

    def products(self, weights: list[Tensor], rows: int) -> float:
        """Seconds of a product of so many rows with one of these matrices."""
        x = self.random(rows, self.side, dtype=weights[0].dtype)

        def work() -> None:
            for weight in weights:
                F.linear(x, weight)

        return self.typical(work) / len(weights)

    def attention(self, dtype: torch.dtype) -> float:
        step = Step([ROWS] * self.factor, device=self.device)
        q, k, v = (self.random(step.total, 16, width, dtype=dtype) for width in (96, 96, 64))
        keys = k.unflatten(0, (step.batch, -1)), v.unflatten(0, (step.batch, -1))

        def work() -> Tensor:
            terms = [("thn,shn->hts", q, keys[0])]
            return attention(step, terms, ("hts,shv->thv", keys[1]), visible=(0, None))

        return self.typical(work)

    def memory(self) -> Iterator[Found]:
        """A copy; and what stands between products, counted as if each read and wrote once: a sum
        and its norm (4 values of this size), a gated unit (3), a rotation (2), rows that go to
        their blocks and come back with their gates (4)."""
        count = (1 << 28 if self.device == "cuda" else 1 << 25) // 4
        source, target = (torch.zeros(count, device=self.device) for _ in range(2))
        taken = self.typical(lambda: target.copy_(source))
        how = f"copy of {4 * count >> 20} MiB, read and written"
        yield Found("peak[memory]", 2 * 4 * count / taken, how)
        x, y = (self.random(ROWS * self.factor, self.side) for _ in range(2))
        gain, gate = self.random(self.side), self.random(len(x), 1)
        order = torch.randperm(len(x), device=self.device)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)

        def between() -> None:
            F.rms_norm(x + y, (self.side,), gain, 1e-6)
            F.silu(x) * y
            torch.stack((even * gate - odd * gate, odd * gate + even * gate), -1)
            torch.empty_like(x).index_copy_(0, order, x.index_select(0, order) * gate)

        taken = self.typical(between)
        how = "a residual sum and its norm, a gated unit, a rotation, rows out of order and back"
        yield Found("rate[memory]", 13 * x.nbytes / taken, how)
        small = torch.zeros(8, device=self.device)
        taken = self.typical(lambda: small.add_(1))
        yield Found("floor", taken, "sum of 8 numbers, with its launch")


def _link(device: str, ranks: int) -> list[Found]:
    """Rate and latency of an all-to-all between the ranks."""

    def taken(bytes: int) -> float:
        sent = torch.zeros(bytes * ranks, dtype=torch.uint8, device=device)
        got = torch.empty_like(sent)
        times = []
        for _ in range(LINK_ROUNDS):
            dist.barrier()
            start = time.perf_counter()
            dist.all_to_all_single(got, sent)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return median(times)

    latency = taken(8)
    whole = taken(LINK_BYTES)
    sent = LINK_BYTES * (ranks - 1)
    how = f"all-to-all of {ranks} processes over {dist.get_backend()}"
    return [
        Found(
            "peak[scale_up]",
            sent / max(whole - latency, 1e-9),
            f"{how}, {LINK_BYTES >> 20} MiB each",
        ),
        Found("latency[scale_up]", latency, f"{how}, 8 bytes"),
    ]
