"""Mistakes and what is said about them, read from ``mistakes/*.txt``.

A case there is a title with the code, the text of ``main.arch``, further files if there are any,
and the whole message. ``python tests/dsl/mistakes.py --update`` writes down what is said now; read
what it changes as you would read a page of the manual.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsl.program import check_file

FOLDER = Path(__file__).with_name("mistakes")
RULE = "=" * 4


@dataclass(frozen=True)
class Case:
    topic: str
    title: str  # "E0204: a misspelt value"
    files: tuple[tuple[str, str], ...]  # name, text; main.arch is the one that is checked
    message: str

    @property
    def code(self) -> str:
        return self.title.split(":")[0]

    def __str__(self) -> str:
        return f"{self.topic}: {self.title}"


def cases() -> list[Case]:
    return [case for path in sorted(FOLDER.glob("*.txt")) for case in _read(path)]


def _read(path: Path) -> Iterator[Case]:
    for section in path.read_text(encoding="utf-8").split(f"{RULE} ")[1:]:
        title, text = section.split("\n", 1)
        source, *rest = re.split(r"^---- (\S+)\n", text, flags=re.MULTILINE)
        parts = [("main.arch", source), *zip(rest[::2], rest[1::2], strict=True)]
        message = next((t.strip("\n") for name, t in parts if name == "says"), "")
        files = tuple((n, t.strip("\n") + "\n") for n, t in parts if n != "says")
        yield Case(path.stem, title, files, message)


@contextmanager
def inside(folder: str | Path) -> Iterator[None]:
    """Work in ``folder``, so that messages show short names."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def said(case: Case) -> str:
    """What is said about a case now."""
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        for name, text in case.files:
            Path(name).write_text(text, encoding="utf-8")
        return "\n\n".join(d.render() for d in check_file("main.arch", warnings=True))


def _update() -> None:
    for path in sorted(FOLDER.glob("*.txt")):
        head = path.read_text(encoding="utf-8").split(f"{RULE} ")[0]
        out = [head]
        for case in _read(path):
            out.append(f"{RULE} {case.title}\n\n{case.files[0][1]}")
            out += [f"\n---- {name}\n{text}" for name, text in case.files[1:]]
            out.append(f"\n---- says\n{said(case)}\n\n")
        path.write_text("".join(out).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__" and sys.argv[1:] == ["--update"]:
    _update()
