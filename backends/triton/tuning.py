"""Tilings that were measured to be the fastest, by GPU and kernel, in files that can be shipped.

A kernel's text holds its shapes, so a mark of the text says both. A table is one JSON file:

    {"format": 1, "gpu": "NVIDIA H100 80GB HBM3", "target": "sm_90", "triton": "3.7.1",
     "kernels": {"NAME:MARK": [{"upto": null, "constants": {"BLOCK_M": 64, ...}, "num_warps": 8,
                                "num_stages": 2, "seconds": 1e-4}, ...]}}

Tables are looked for in ``$DSLC_TUNED``, a file or a folder; else in the user's cache, where ``dslc
tune`` writes them; else among those that ship with dslc. Of several for a target the one of the GPU
that is asked for is taken, else the first by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backends.triton.kernel import Config, Kernel, Operator
from backends.triton.targets import Target
from compiler.errors import UserError

FORMAT = 1
OWN = "DSLC_TUNED"
SHIPPED = Path(__file__).with_name("tuned")


@dataclass
class Table:
    """What was measured on one kind of GPU.

    Attributes:
        kernels: rows by ``key``, as the file has them.
    """

    gpu: str
    target: str
    triton: str
    kernels: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def has(self, kernel: Kernel) -> bool:
        return key(kernel) in self.kernels

    def tuned(self, kernel: Kernel) -> Kernel:
        """The kernel with the tilings of the table; as it is where the table lacks it."""
        rows = self.kernels.get(key(kernel), [])
        configs = tuple(
            Config(dict(row["constants"]), row["num_warps"], row["num_stages"], row["upto"])
            for row in rows
        )
        names = {frozenset(config.constants) for config in kernel.configs}
        bounds = [config.upto for config in configs]
        if bounds != [config.upto for config in kernel.configs]:
            return kernel  # other bounds than the generator's today
        if any(frozenset(config.constants) not in names for config in configs):
            return kernel
        return replace(kernel, configs=configs)

    def apply(self, operator: Operator) -> Operator:
        kernels = tuple(self.tuned(kernel) for kernel in operator.kernels)
        return replace(operator, kernels=kernels) if kernels != operator.kernels else operator

    def add(self, kernel: Kernel, best: list[tuple[Config, float]]) -> None:
        """Keep the fastest tiling for each bound of the kernel's count, with its seconds."""
        self.kernels[key(kernel)] = [
            {
                "upto": config.upto,
                "constants": dict(config.constants),
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                "seconds": seconds,
            }
            for config, seconds in best
        ]

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        data = {"format": FORMAT, "gpu": self.gpu, "target": self.target, "triton": self.triton}
        text = json.dumps({**data, "kernels": self.kernels}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(text + "\n")
        new.replace(path)


def key(kernel: Kernel) -> str:
    """The kernel's name, and a mark of its text."""
    text = "\n".join([kernel.source, *(text for _, text in kernel.helpers)])
    return f"{kernel.name}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def read(path: Path) -> Table:
    """A table.

    Raises:
        UserError: the file holds none; the message names it.
    """
    try:
        data = json.loads(path.read_text())
        if data["format"] == FORMAT:
            table = Table(data["gpu"], data["target"], data["triton"], dict(data["kernels"]))
            if all(_is_row(row) for rows in table.kernels.values() for row in rows):
                return table
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is no table of tuned kernels that this version can read")


def _is_row(row: Mapping[str, Any]) -> bool:
    numbers = (*row["constants"].values(), row["num_warps"], row["num_stages"])
    upto = row["upto"]
    return all(isinstance(n, int) for n in numbers) and (upto is None or isinstance(upto, int))


def find(target: Target, gpu: str | None = None) -> Table | None:
    """The table for a target, of this GPU where there is one.

    Raises:
        UserError: a file in one of the places is no table.
    """
    for place in _places():
        tables = [table for table in map(read, _files(place)) if table.target == target.name]
        for table in tables:
            if table.gpu == gpu:
                return table
        if tables:
            return tables[0]
    return None


def _places() -> Iterator[Path]:
    if own := os.environ.get(OWN):
        yield Path(own)
        return
    yield user_folder()
    yield SHIPPED


def _files(place: Path) -> list[Path]:
    return sorted(place.glob("*.json")) if place.is_dir() else [place] if place.exists() else []


def user_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dslc" / "tuned"


def default_path(gpu: str) -> Path:
    """Where ``dslc tune`` keeps what it measured."""
    own = os.environ.get(OWN)
    if own and own.endswith(".json"):
        return Path(own)
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return (Path(own) if own else user_folder()) / f"{name}.json"
