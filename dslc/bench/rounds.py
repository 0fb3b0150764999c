"""Contestants in processes of their own, taking turns."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from compiler.errors import UserError
from dslc.bench.contestants import Absent, Setup


@dataclass(frozen=True)
class Row:
    """A contestant's medians, in tokens per second.

    Attributes:
        agrees: how many tokens it decodes before the first that differs from the first
            contestant's.
    """

    name: str
    about: str
    prefill: float
    decode: float
    agrees: int


def race(
    names: Sequence[str], setup: Setup, rounds: int, progress: Callable[[str], None]
) -> tuple[list[Row], dict[str, str]]:
    """Let contestants take turns on one prompt.

    Returns:
        A row for each that could take part, and why each other one could not.

    Raises:
        UserError: the first one cannot.
    """
    absent: dict[str, str] = {}
    turns: dict[str, list[dict[str, Any]]] = {}
    prompt = [(1 + 37 * i) % setup.vocab for i in range(setup.prompt)]
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        workers: dict[str, _Worker] = {}
        for name in names:
            progress(f"{name} loads")
            worker = stack.enter_context(_Worker(name, replace(setup, scratch=Path(scratch))))
            try:
                worker.start()
            except Absent as reason:
                absent[name] = str(reason)
                continue
            workers[name] = worker
        if names[0] in absent:
            raise UserError(f"{names[0]}: {absent[names[0]]}")
        for number in range(rounds + 1):
            for name, worker in list(workers.items()):
                progress(f"round {number} of {rounds}, {name}")
                try:
                    turn = worker.ask(prompt=prompt, new=setup.new)
                except Absent as reason:  # it died, of too little memory say
                    absent[name] = str(reason)
                    del workers[name]
                    continue
                if number:  # the first one warms up
                    turns.setdefault(name, []).append(turn)
        if names[0] in absent:
            raise UserError(f"{names[0]}: {absent[names[0]]}")
        rows = []
        for name, worker in workers.items():
            mine, first = turns[name], turns[names[0]]
            rows.append(
                Row(
                    name=name,
                    about=worker.about,
                    prefill=setup.prompt / median(turn["prefill"] for turn in mine),
                    decode=(setup.new - 1) / median(turn["decode"] for turn in mine),
                    agrees=_same(mine[0]["tokens"], first[0]["tokens"]),
                )
            )
    return rows, absent


def _same(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = list(zip(left, right, strict=True))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


class _Worker:
    """A contestant's process."""

    def __init__(self, name: str, setup: Setup):
        self.name = name
        self.about = ""
        self._asked = asdict(setup)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dslc.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def start(self) -> None:
        """Wait until it has loaded.

        Raises:
            Absent: it cannot take part.
        """
        said = self._said([self.name, {k: _plain(v) for k, v in self._asked.items()}])
        if "absent" in said:
            raise Absent(said["absent"])
        self.about = said["about"]

    def ask(self, **fields: Any) -> dict[str, Any]:
        """One turn."""
        return self._said(fields)

    def _said(self, question: object) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise Absent(f"its process ended: {' '.join(last)}")
        found: dict[str, Any] = json.loads(line)
        return found


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
