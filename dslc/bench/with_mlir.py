"""A directory that the MLIR backend compiled, and the same graph by the PyTorch backend."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from compiler import directory
from compiler.manifest import digest, read
from compiler.parse import parse
from dslc.bench.contestants import Contestant, Round, Setup


class WithMlir:
    """A module, run by IREE."""

    def __init__(self, setup: Setup):
        from iree import runtime

        from backends.mlir.model import load

        self._model = load(setup.directory, setup.checkpoint)
        version = getattr(runtime, "version", None)
        self.about = f"IREE {getattr(version, 'VERSION', '')}".strip()

    def round(self, prompt: Sequence[int], new: int) -> Round:
        times: list[float] = []
        started = time.perf_counter()
        out = self._model.generate(
            [list(prompt)],
            max_new_tokens=new,
            on_token=lambda step, token: times.append(time.perf_counter()),
        )
        return Round(times[0] - started, times[-1] - times[0], out[0][len(prompt) :])


def with_pytorch(setup: Setup) -> Contestant:
    """The directory's graph, written as ``model.py``."""
    from backends.pytorch.emit.module import emit
    from dslc.bench.ours import Ours

    about = read(setup.directory)
    graph = (setup.directory / "graph.txt").read_bytes()
    files = {"graph.txt": graph, "model.py": emit(parse(graph.decode())).encode()}
    hashes = {name: digest(data) for name, data in files.items()}
    about = about.model_copy(update={"backend": "pytorch", "files": hashes})
    where = setup.scratch / "pytorch"
    directory.write(where, about, files)
    return Ours(replace(setup, directory=where))
