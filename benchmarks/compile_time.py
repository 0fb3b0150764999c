"""Seconds and memory of `dslc compile` and `dslc check`, as whole processes: start-up included.

    python benchmarks/compile_time.py [--runs N] [--json] [FILE]

The goal on two cores with a warm file cache: compile under 3 s and 300 MB, however many layers and
experts there are; check under 0.5 s. Printed, never asserted: a busy machine proves nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "dsv3.arch"
VARIANTS = [[], ["--set", "layers=610"], ["--set", "experts=2560"]]
BYTES_PER_MAXRSS = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Timing:
    command: str
    runs: int
    median_seconds: float
    min_seconds: float
    max_seconds: float
    peak_rss_bytes: int


def run_once(arguments: list[str]) -> tuple[float, int]:
    """Wall-clock seconds and peak resident bytes of one dslc process, in an empty folder.

    Linux counts the parent's memory at the fork too: keep this script smaller than dslc.
    """
    command = [sys.executable, "-m", "dslc", *arguments]
    given = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors, env=given
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            message = errors.read().decode(errors="replace").strip()
            sys.exit(f"dslc {' '.join(arguments)}: exit status {process.returncode}\n{message}")
    return seconds, usage.ru_maxrss * BYTES_PER_MAXRSS


def measure(command: str, arguments: list[str], runs: int) -> Timing:
    run_once(arguments)  # warms the file cache and writes the bytecode
    results = [run_once(arguments) for _ in range(runs)]
    seconds = [result[0] for result in results]
    return Timing(
        command=command,
        runs=runs,
        median_seconds=statistics.median(seconds),
        min_seconds=min(seconds),
        max_seconds=max(seconds),
        peak_rss_bytes=max(result[1] for result in results),
    )


def measure_all(model: Path, runs: int) -> list[Timing]:
    commands = [["check"], *(["compile", *options] for options in VARIANTS)]
    return [
        measure(" ".join([command, model.name, *options]), [command, str(model), *options], runs)
        for command, *options in commands
    ]


def table(timings: list[Timing]) -> Table:
    result = Table("dslc", title="compile time: whole processes, warm file cache")
    for heading in ("median s", "min s", "max s", "peak MB"):
        result.add_column(heading, justify="right")
    for timing in timings:
        seconds = (timing.median_seconds, timing.min_seconds, timing.max_seconds)
        result.add_row(
            timing.command,
            *(f"{value:.2f}" for value in seconds),
            f"{timing.peak_rss_bytes / 1e6:.0f}",
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Time dslc compile and dslc check.")
    parser.add_argument("file", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    timings = measure_all(options.file.resolve(), options.runs)
    if options.json:
        print(json.dumps({"cores": os.cpu_count(), "timings": [asdict(t) for t in timings]}))
    else:
        Console().print(table(timings))


if __name__ == "__main__":
    main()
