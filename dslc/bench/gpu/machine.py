"""A GPU: what it is, how fast it copies and multiplies, and how long calls take on it."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from backends.triton.kernel import Operator
from backends.triton.targets import Target, target_named
from backends.triton.write import kernels_text

Call = Callable[[], Any]
REPEATS, LEAST_SECONDS, MOST_SECONDS = 20, 0.1, 2.0
COPIED = 1 << 30
SIDE = 8192
COLD = 100e6  # bytes: calls go round so much input that L2 holds none of it


@dataclass(frozen=True)
class Roof:
    """What the machine was measured to do.

    Attributes:
        bytes_per_second: read and written while a large tensor is copied.
        flops: of torch's dense products, by dtype.
    """

    bytes_per_second: float
    flops: dict[str, float]

    def seconds(self, bytes: float, flops: float, dtype: str) -> float:
        """The least time for so much, at the measured rates."""
        rate = self.flops.get(dtype) or self.flops.get("bfloat16") or float("inf")
        return max(bytes / self.bytes_per_second, flops / rate)


class Machine(Protocol):
    """What times calls; tests have one without a GPU."""

    name: str
    device: str
    target: Target

    def seconds(self, calls: Sequence[Call]) -> float:
        """The median time of one of these calls, which do the same on other data."""

    def roof(self) -> Roof: ...


def absent() -> str | None:
    """Why kernels cannot be timed here, in a sentence; None: they can."""
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    try:
        version("triton")
    except PackageNotFoundError:
        return "Triton is not installed here: pip install 'dslc[triton]'"
    return None


def versions() -> dict[str, str]:
    import torch

    cuda = torch.version.cuda or torch.version.hip or "none"
    return {"torch": torch.__version__, "triton": version("triton"), "cuda": cuda}


class Gpu:
    """The GPU that torch has."""

    def __init__(self) -> None:
        import torch

        self.device = "cuda"
        self.name = torch.cuda.get_device_name()
        if torch.version.hip:
            arch = torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
        else:
            arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        self.target = target_named(arch)

    def seconds(self, calls: Sequence[Call]) -> float:
        """In a CUDA graph, so that no launch from Python is timed; calls that cannot be in one
        (they wait for the GPU) are timed one by one."""
        import torch

        for call in calls:
            call()
        torch.cuda.synchronize()
        replay: Call
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = [call() for call in calls]
            replay = graph.replay
            del kept
        except RuntimeError:
            torch.cuda.synchronize()

            def replay() -> None:
                for call in calls:
                    call()

        return self._median(replay) / len(calls)

    def _median(self, run: Call) -> float:
        import torch

        run()
        torch.cuda.synchronize()
        times: list[float] = []
        while len(times) < REPEATS or sum(times) < LEAST_SECONDS:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
            if sum(times) > MOST_SECONDS:
                break
        return statistics.median(times)

    def roof(self) -> Roof:
        import torch

        x = torch.empty(COPIED, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        copied = 2 * COPIED / self.seconds([lambda: y.copy_(x)])
        a = torch.randn(SIDE, SIDE, device=self.device, dtype=torch.bfloat16)
        flops = {"bfloat16": 2 * SIDE**3 / self.seconds([lambda: a @ a])}
        if self.target.fp8:
            b, one = a.to(torch.float8_e4m3fn), torch.ones((), device=self.device)

            def product() -> Any:
                return torch._scaled_mm(b, b.T, one, one, out_dtype=torch.bfloat16)

            flops["float8_e4m3fn"] = 2 * SIDE**3 / self.seconds([product])
        return Roof(copied, flops)


def loaded(*operators: Operator) -> ModuleType:
    """The module that ``kernels.py`` of these operators is. Triton reads its text from a file."""
    folder = Path(tempfile.mkdtemp(prefix="dslc-bench-"))
    path = folder / "kernels.py"
    path.write_text(kernels_text(operators, "Timed."))
    spec = importlib.util.spec_from_file_location(f"kernels_of_{folder.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
