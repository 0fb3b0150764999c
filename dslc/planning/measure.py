"""What this machine reaches, measured: for ``dslc calibrate``. Needs torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SIDE = 1024  # of the matrices that are multiplied on a CPU; on a GPU eight times as large
LINK_BYTES = 8 << 20
LINK_ROUNDS = 20


def devices() -> tuple[str, int]:
    """What there is to measure, and how many of it: cuda if there is a GPU, else cpu."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    return "cpu", os.cpu_count() or 1


@dataclass(frozen=True)
class Found:
    """A figure: its name in a device's table, the value with its unit, how it was measured."""

    name: str
    value: str
    how: str


def best(work: Callable[[], object], wait: Callable[[], None], seconds: float = 0.4) -> float:
    """The shortest time of ``work`` within about so many seconds, after one run to warm up."""
    work()
    wait()
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        wait()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def machine(device: str) -> tuple[str, list[Found]]:
    """The device's name and its figures.

    Args:
        device: cpu or cuda.
    """
    on_gpu = device == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    side = SIDE * (8 if on_gpu else 1)
    found = [_memory(on_gpu)]
    names = {torch.float32: "f32", torch.bfloat16: "bf16"}
    for dtype, name in names.items():
        a = torch.randn(side, side, device=device).to(dtype)
        b = torch.randn(side, side, device=device).to(dtype)
        taken = best(lambda a=a, b=b: a @ b, wait)  # type: ignore[misc]
        how = f"{side} x {side} x {side}, torch {torch.__version__}"
        found.append(Found(f"peak[{name}]", f"{2 * side**3 / taken / 1e9:.1f} GFLOPS", how))
    count = (1 << 28 if on_gpu else 1 << 25) // 4
    source, target = (torch.zeros(count, device=device) for _ in range(2))
    taken = best(lambda: target.copy_(source), wait)
    moved = 2 * 4 * count
    how = f"copy of {4 * count >> 20} MiB, read and written"
    found.append(Found("peak[memory]", f"{moved / taken / 1e9:.2f} GB/s", how))
    small = torch.zeros(8, device=device)
    taken = best(lambda: small.add_(1), wait)
    found.append(Found("floor", f"{taken * 1e6:.2f} us", "sum of 8 numbers, with its launch"))
    if on_gpu:
        about = torch.cuda.get_device_properties(0)
        found.append(Found("sms", f"{about.multi_processor_count}", "as the driver says"))
        return about.name, found
    return "CPU", found


def _memory(on_gpu: bool) -> Found:
    if on_gpu:
        bytes = torch.cuda.get_device_properties(0).total_memory
    else:
        bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Found("memory", f"{bytes / 1e9:.1f} GB", "as the system says")


# -- between processes -----------------------------------------------------------------------------


def link() -> tuple[Found, Found] | None:
    """Rate and latency of an all-to-all of two local processes over gloo; None where none runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_talk, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    try:
        rate, latency = queue.get(timeout=120)
    except Exception:
        return None
    finally:
        for worker in workers:
            worker.join(timeout=10)
            if worker.is_alive():
                worker.terminate()
    how = "all-to-all of 2 processes over gloo"
    return (
        Found("peak[scale_up]", f"{rate / 1e9:.3f} GB/s", f"{how}, {LINK_BYTES >> 20} MiB"),
        Found("latency[scale_up]", f"{latency * 1e6:.1f} us", f"{how}, 8 bytes"),
    )


def _talk(rank: int, port: int, queue: multiprocessing.Queue[tuple[float, float]]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)

    def taken(bytes: int) -> float:
        sent = torch.zeros(bytes, dtype=torch.uint8)
        got = torch.empty_like(sent)
        shortest = float("inf")
        for _ in range(LINK_ROUNDS):
            dist.barrier()
            start = time.perf_counter()
            dist.all_to_all_single(got, sent)
            shortest = min(shortest, time.perf_counter() - start)
        return shortest

    latency = taken(8)
    whole = taken(2 * LINK_BYTES)  # half of it stays
    if rank == 0:
        queue.put((LINK_BYTES / max(whole - latency, 1e-9), latency))
    dist.destroy_process_group()
