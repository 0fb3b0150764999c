"""What a module of the MLIR backend costs: compile time by depth, and the bytes that a token reads.

    python benchmarks/mlir.py --layers 4 16 61           # processor seconds of IREE's compiler
    python benchmarks/mlir.py DIR --checkpoint CKPT      # a compiled directory: load, memory, bytes

Bytes are counted, not computed: a fresh process maps the weights, decodes one token, and the system
says how much of the mapping it touched. Printed, never asserted.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np

import dslc
from backends.mlir.artifact import build
from backends.mlir.model import load
from compiler.manifest import read, verified_files
from dslc.bench.roof import bytes_per_token


def compile_time(model: str, dims: str, layers: int) -> None:
    compiled = dslc.compile(model, dims=dims, set={"layers": layers}).compiled
    before, begin = os.times(), time.perf_counter()
    files = build(compiled.program, compiled.after("elaborate"), "float32", lambda _: None)
    seconds, after = time.perf_counter() - begin, os.times()
    spent = sum(after[:4]) - sum(before[:4])
    lines = files["module.mlir"].count(b"\n")
    print(
        f"{layers:3} layers: {spent:5.1f} s of processor time, {seconds:5.1f} s in all, "
        f"{lines:,} lines, {len(files['module.vmfb']):,} bytes"
    )


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process has touched."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            counts = words[-1] == str(path)
        elif counts and words[0] == "Rss:":
            found += int(words[1]) * 1024
    return found


def own_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def bytes_read(directory: Path, checkpoint: Path) -> None:
    load(directory, checkpoint, note=print)  # lays the weights out, if nobody has
    begin = time.perf_counter()
    model = load(directory, checkpoint)
    print(f"loaded in {time.perf_counter() - begin:.2f} s, {own_memory() / 1e6:,.0f} MB of its own")
    archive = model.session.mapped
    assert archive is not None
    cache = model.new_cache(1, 8)
    cache.lengths = [1]
    before = resident(archive)
    model.session.step(np.array([[5]]), [1], cache, True)
    touched = resident(archive) - before
    manifest = read(directory)
    source = verified_files(directory, manifest)["source.txt"].decode()
    width = 4 if model.layout.dtype == "float32" else 2
    patterns = [row.pattern() for row in manifest.parameters]
    needed = bytes_per_token(source, width, 1, patterns=patterns)
    print(
        f"one decoded token touches {touched / 1e6:,.1f} MB of the weights; the chosen experts and "
        f"the rest are {needed / 1e6:,.1f} MB: {touched / needed:.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="DIR", type=Path, nargs="?")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--model", default="dsv3")
    parser.add_argument("--dims", default="small")
    parser.add_argument("--layers", type=int, nargs="*", default=[])
    options = parser.parse_args()
    for layers in options.layers:
        compile_time(options.model, options.dims, layers)
    if options.directory:
        if not options.checkpoint:
            parser.error("DIR needs --checkpoint")
        bytes_read(options.directory, options.checkpoint)


if __name__ == "__main__":
    main()
