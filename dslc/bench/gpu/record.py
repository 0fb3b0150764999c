"""What was timed on one GPU, in a file: a run that was broken off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from backends.triton.kernel import Operator
from compiler.errors import UserError

FORMAT = 1  # of the file


def default_path(gpu: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return Path("benchmarks") / "results" / f"{slug}.json"


def digest(operator: Operator) -> str:
    """Of the text that is timed, tiles included."""
    parts = [operator.launcher]
    for kernel in operator.kernels:
        parts += [kernel.source, *(text for _, text in kernel.helpers)]
        parts += [f"{config.upto} {config.text()}" for config in kernel.configs]
    return digest_of(*parts)


def digest_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class Record:
    """Rows by case, and the machine's measured rates.

    Raises:
        UserError: the file is of another GPU, or no such file.
    """

    def __init__(self, path: Path, gpu: str, versions: Mapping[str, str]):
        self.path = path
        self.data: dict[str, Any] = self._read() or {"format": FORMAT, "gpu": gpu, "rows": {}}
        if self.data["gpu"] != gpu:
            raise UserError(f"{path} holds what was timed on {self.data['gpu']}; this is {gpu}")
        if self.data.get("versions") != dict(versions):
            # Other versions are another measurement, of everything.
            self.data.update(versions=dict(versions), rows={}, roof=None)

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            data = json.loads(self.path.read_text())
            if data["format"] == FORMAT and isinstance(data["rows"], dict) and data["gpu"]:
                return dict(data)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{self.path} holds no timings that this version can go on with")

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return dict(self.data["rows"])

    @property
    def roof(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.data.get("roof")
        return found

    def has(self, name: str, digest: str) -> bool:
        """Was this text timed already, without a failure?"""
        row = self.data["rows"].get(name)
        return row is not None and row["digest"] == digest and "failed" not in row

    def set_roof(self, roof: Mapping[str, Any]) -> None:
        self.data["roof"] = dict(roof)
        self._write()

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        self.data["rows"][name] = dict(row)
        self._write()

    def _write(self) -> None:
        """Whole or not at all."""
        self.data["date"] = date.today().isoformat()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        new.write_text(json.dumps(self.data, indent=1) + "\n")
        new.replace(self.path)
