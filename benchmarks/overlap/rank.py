"""One rank of benchmarks/overlap: runs both programs in turn and times them."""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

import dslc
from backends.pytorch.runtime.mesh import Group

LINK_BYTES = 1 << 20


def timed(work) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def between(group: Group) -> dict[str, float]:
    """Rate and latency of what the ranks exchange, as ``dslc calibrate`` measures them on one
    host: the median of some rounds."""

    def taken(count: int) -> float:
        rows, each = torch.zeros(2 * count, 8, dtype=torch.uint8), [count, count]
        return median(timed(lambda: group.all_to_all(rows, each, each)) for _ in range(10))

    latency, whole = taken(1), taken(LINK_BYTES // 8)
    return {"rate": LINK_BYTES / (whole - latency), "latency": latency}


class Watch:
    """Seconds that this rank has spent in collectives."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.by_kind: dict[str, float] = {}
        for name in ("all_to_all", "all_reduce", "all_gather", "reduce_scatter"):
            setattr(Group, name, self._watching(getattr(Group, name)))

    def _watching(self, method):
        def run(*given, **options):
            start = time.perf_counter()
            try:
                return method(*given, **options)
            finally:
                taken = time.perf_counter() - start
                self.seconds += taken
                what = given[4] if len(given) > 4 else options.get("what", method.__name__)
                self.by_kind[what] = self.by_kind.get(what, 0.0) + taken

        return run


def main() -> None:
    folder, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    models = {name: dslc.load(folder / name, seed=1) for name in ("sequential", "overlapped")}
    for own, other in zip(*(m.module.parameters() for m in models.values()), strict=True):
        other.data = own.data  # one set of weights for both programs
    link = between(models["sequential"].mesh.group("ep"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(given["vocab"], (given["batch"], given["prompt"]), generator=generator)
    watch = Watch()
    found: dict[str, list[float]] = {name: [] for name in (*models, "communication")}
    results = {}
    with torch.inference_mode():
        for turn in range(given["rounds"] + 1):
            for name, model in models.items():
                before = watch.seconds
                taken = timed(lambda model=model, name=name: results.update(
                    {name: model(tokens, cache=model.new_cache(len(tokens)), last_only=True)}
                ))  # fmt: skip
                if turn == 0:  # the first brings memory and groups
                    continue
                found[name].append(taken)
                if name == "sequential":
                    found["communication"].append(watch.seconds - before)
    error = (results["sequential"] - results["overlapped"]).abs().max()
    out = {name: median(values) for name, values in found.items()}
    out["all"] = found
    out["error"] = float(error / results["sequential"].abs().max())
    out["link"] = link
    out["kinds"] = watch.by_kind
    out["traffic"] = models["sequential"].mesh.traffic
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main()
