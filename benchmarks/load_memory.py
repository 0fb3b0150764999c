"""Memory and time of loading a checkpoint: it must take the model's own size and one tensor.

    python benchmarks/load_memory.py [--layers N] [--stored DTYPE] [--dtype DTYPE] [--json]

Writes a random checkpoint with `dslc init` (4 GB by default, in the temporary folder, removed at
the end), loads it in fresh processes, and samples RssAnon and RssFile from /proc/self/status every
two milliseconds. Beside `dslc.load`, what reading through a memory map takes: safetensors' own
`load_file`, whose tensors stay in the map, and the same followed by a copy, which is what a model
in another dtype needs. Each once with the file out of the page cache (cold), once with it there.
Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOW = ("dslc", "mapped", "mapped and copied")


@dataclass(frozen=True)
class Loading:
    """Bytes; ``beside`` is what was needed beyond the model itself: one tensor is allowed."""

    how: str
    cold: bool
    seconds: float
    gigabytes_per_second: float
    model: int
    largest_tensor: int
    peak_anonymous: int
    beside: int
    peak_file_backed: int


def resident() -> tuple[int, int]:
    """(RssAnon, RssFile) of this process."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found[name] = int(rest.split()[0]) * 1024
    return found["RssAnon"], found["RssFile"]


class Sampler(threading.Thread):
    """The largest growth of anonymous and file-backed memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = resident()
        self.peak = [0, 0]
        self.done = threading.Event()

    def run(self) -> None:
        while True:
            last = self.done.is_set()
            for kind, (now, before) in enumerate(zip(resident(), self.before, strict=True)):
                self.peak[kind] = max(self.peak[kind], now - before)
            if last:
                return
            time.sleep(0.002)

    def __enter__(self) -> "Sampler":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()


def child(how: str, compiled: str, checkpoint: Path, dtype: str) -> dict[str, float]:
    """Load in this process, which has done nothing else."""
    import torch
    from safetensors.torch import load_file

    import backends.pytorch.load  # noqa: F401  (its import is not what is measured)
    import dslc

    files = sorted(checkpoint.glob("*.safetensors"))
    with Sampler() as sampler:
        start = time.perf_counter()
        if how == "dslc":
            tensors = dslc.load(compiled, checkpoint, dtype=dtype).state_dict()
        else:
            tensors = {}
            for file in files:
                for name, tensor in load_file(file).items():
                    copy = how == "mapped and copied"
                    tensors[name] = tensor.to(getattr(torch, dtype), copy=copy)
        if how == "mapped":  # nothing has been read yet
            for tensor in tensors.values():
                tensor.view(torch.uint8).view(-1)[::4096].sum()
        seconds = time.perf_counter() - start
    sizes = [tensor.nbytes for tensor in tensors.values()]
    return {
        "seconds": seconds,
        "model": sum(sizes),
        "largest_tensor": max(sizes),
        "peak_anonymous": sampler.peak[0],
        "peak_file_backed": sampler.peak[1],
    }


def drop_from_cache(files: list[Path]) -> None:
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(how: str, compiled: Path, checkpoint: Path, dtype: str, cold: bool) -> Loading:
    files = sorted(checkpoint.glob("*.safetensors"))
    if cold:
        drop_from_cache(files)
    command = [sys.executable, __file__, "--child", how, str(compiled), str(checkpoint), dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment())
    found = json.loads(done.stdout)
    read = sum(file.stat().st_size for file in files)
    return Loading(
        how=how,
        cold=cold,
        gigabytes_per_second=read / found["seconds"] / 1e9,
        beside=found["peak_anonymous"] - found["model"],
        **found,
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}


def dslc_command(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "dslc", *arguments], stdout=2, check=True, env=environment()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory that loading takes.")
    parser.add_argument("--layers", type=int, default=19, help="of dsv3's preset m813: 19 are 4 GB")
    parser.add_argument("--set", action="append", default=[], help="as of dslc init")
    parser.add_argument("--stored", default="bfloat16", help="dtype of the checkpoint")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the model")
    parser.add_argument("--how", action="append", choices=HOW, help="all unless given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        how, compiled, checkpoint, dtype = options.child
        print(json.dumps(child(how, compiled, Path(checkpoint), dtype)))
        return
    sizes = ["--dims", "m813", "--set", f"layers={options.layers}"]
    sizes += [part for setting in options.set for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, compiled = Path(folder, "checkpoint"), Path(folder, "compiled")
        dslc_command("init", str(checkpoint), "dsv3", *sizes, "--dtype", options.stored)
        dslc_command("compile", "dsv3", "--checkpoint", str(checkpoint), "-o", str(compiled))
        found = [
            measure(how, compiled, checkpoint, options.dtype, cold)
            for how in options.how or HOW
            for cold in (True, False)
        ]
    if options.json:
        print(json.dumps([asdict(loading) for loading in found]))
        return
    one = found[0]
    print(
        f"{options.stored} checkpoint, {options.dtype} model of {one.model / 1e6:,.0f} MB, "
        f"largest tensor {one.largest_tensor / 1e6:,.0f} MB; peaks above the process before"
    )
    heads = ("how", "cache", "anonymous MB", "beside the model MB", "file-backed MB", "s", "GB/s")
    print("{:<18} {:<5} {:>13} {:>20} {:>15} {:>6} {:>6}".format(*heads))
    for row in found:
        print(
            f"{row.how:<18} {'cold' if row.cold else 'warm':<5} {row.peak_anonymous / 1e6:>13,.0f} "
            f"{row.beside / 1e6:>20,.1f} {row.peak_file_backed / 1e6:>15,.0f} "
            f"{row.seconds:>6.1f} {row.gigabytes_per_second:>6.2f}"
        )


if __name__ == "__main__":
    main()
