"""Where the time of a compiled model goes on a CPU: a prompt by operation, a token by piece.

    python benchmarks/cpu_profile.py DIR [--checkpoint DIR] [--prompt 512] [--new 64] [--runs 7]

DIR is what `dslc compile --optimize` wrote. The prompt's operations are those that torch's profiler
sees in its second-fastest run; products of few rows, which are compiled code, are timed beside it.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import dslc
from backends.pytorch.memory import keep_freed
from backends.pytorch.model import Model

Run = Callable[[list[Tensor]], list[Tensor]]


class Clock:
    """Seconds of each call, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - begin)

    def around(self, name: str, run: Run) -> Run:
        def timed(given: list[Tensor]) -> list[Tensor]:
            with self.timing(name):
                return run(given)

        return timed

    def median(self, name: str) -> float:
        return 1e3 * statistics.median(self.seconds[name])


def prefill(model: Model, prompt: Tensor, runs: int) -> None:
    def once() -> None:
        cache = model.new_cache(1, capacity=prompt.shape[1])
        model(prompt, cache=cache, last_only=True)

    clock = Clock()
    for _ in range(runs):
        with clock.timing("prompt"):
            once()
    middle = clock.median("prompt")
    tokens = prompt.shape[1]
    print(f"a prompt of {tokens} tokens: {middle:.0f} ms, {tokens / middle * 1e3:.0f} tokens/s")
    products = model._products
    if products is not None:
        products._wide = clock.around("few rows", products._wide)
        once()
        times = clock.seconds["few rows"]
        print(f"  {sum(times) * 1e3:7.1f} ms in {len(times):5,} products of few rows")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        once()
    for row in sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)[:12]:
        print(f"  {row.self_cpu_time_total / 1e3:7.1f} ms in {row.count:5,} {row.key}")


def decode(model: Model, prompt: Tensor, new: int) -> None:
    decoder = model._decoder
    if decoder is None:
        print("decode: not compiled ahead of time")
        return
    clock, cache = Clock(), model.new_cache(1, capacity=prompt.shape[1] + new)
    model(prompt, cache=cache, last_only=True)
    names = [call.piece for call in decoder._plan.calls]
    for call, name in zip(decoder._calls, names, strict=True):
        object.__setattr__(call, "run", clock.around(name, call.run))
    for _ in range(new):
        with clock.timing("token"):
            model(prompt[:, :1], cache=cache)
    print(f"a token: {clock.median('token'):.2f} ms")
    rest = clock.median("token")
    for name in dict.fromkeys(names):
        each, count = clock.median(name), names.count(name)
        rest -= each * count
        print(f"  {each * count:7.2f} ms in {count:3} x {name}")
    print(f"  {rest:7.2f} ms between them")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--checkpoint")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    keep_freed()
    model = dslc.load(options.directory, options.checkpoint)
    below = model.manifest.entries["main"].inputs[0].below
    prompt = torch.randint(below, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prefill(model, prompt, options.runs)
        decode(model, prompt, options.new)


if __name__ == "__main__":
    main()
