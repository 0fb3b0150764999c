"""The parser's tables are kept between processes, and nothing that is found there can do harm."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from lark import Lark

from dsl import grammar as module
from dsl.syntax_errors import DECLARATIONS, KEYWORDS, START

TEXT = "const a = 1\nblock B[d] { def (x[d]) -> y[d] { y[d] = 2 * x[d] } }\n"
SOURCE = Path(module.__file__).with_name("grammar.lark").read_text(encoding="utf-8")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Lark]:
    """Loads the grammar as a new process would, its cache under ``tmp_path``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return module.grammar.__wrapped__


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "dslc").glob("grammar-*"))


def test_the_tables_are_kept_for_their_owner_alone(
    load: Callable[[], Lark], tmp_path: Path
) -> None:
    load()
    assert (tmp_path / "dslc").stat().st_mode & 0o777 == 0o700
    (table,) = kept(tmp_path)
    assert json.loads(table.read_bytes()).keys() == {"data", "memo"}
    assert load().parse(TEXT) == module.grammar().parse(TEXT)  # from what was kept


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch sprung",)


@pytest.mark.parametrize(
    "poison",
    [b"\0" * 100, b'{"data": {}, "memo": {}}', pickle.dumps(Trap())],
    ids=["zeros", "no tables", "a pickle"],
)
def test_damaged_tables_are_built_anew(
    load: Callable[[], Lark], tmp_path: Path, poison: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.hashlib, "sha256", FixedHash)
    (tmp_path / "dslc").mkdir(mode=0o700)
    table = tmp_path / f"dslc/grammar-{FixedHash().hexdigest()[:32]}.json"
    table.write_bytes(poison)
    assert load().parse(TEXT) == module.grammar().parse(TEXT)
    assert json.loads(table.read_bytes())["data"]
    assert not Path("sprung").exists()


class FixedHash:
    """Names the file of the tables, whatever they are made of."""

    def __init__(self, *_: object):
        pass

    def hexdigest(self) -> str:
        return "0" * 64


def test_a_folder_that_others_may_write_to_is_not_used(
    load: Callable[[], Lark], tmp_path: Path
) -> None:
    (tmp_path / "dslc").mkdir()
    (tmp_path / "dslc").chmod(0o777)
    assert load().parse(TEXT)
    assert kept(tmp_path) == []


def test_no_folder_at_all(load: Callable[[], Lark], tmp_path: Path) -> None:
    (tmp_path / "dslc").write_text("a file")
    assert load().parse(TEXT)


def test_no_home(load: Callable[[], Lark], monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("no home is known")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert load().parse(TEXT)


def test_old_tables_are_cleared_away(load: Callable[[], Lark], tmp_path: Path) -> None:
    (tmp_path / "dslc").mkdir(mode=0o700)
    for n in range(20):
        (tmp_path / f"dslc/grammar-{n}.json").write_text("{}")
        os.utime(tmp_path / f"dslc/grammar-{n}.json", (n, n))
    load()
    assert len(kept(tmp_path)) == module.MOST_KEPT


# -- what messages know of the grammar -------------------------------------------------------------


def test_messages_know_the_words_of_the_language() -> None:
    (reserved,) = re.findall(r"^NAME: /\(\?!\(([a-z|]+)\)\\b\)", SOURCE, re.MULTILINE)
    assert set(reserved.split("|")) == set(KEYWORDS) - {
        "device",
        "extern",
    }  # words only where they can stand


@pytest.mark.parametrize(
    "line", ["  param W[d]", "  y[d] = x", "  cached k[s] : f32 = x", "  }", "if a {"]
)
def test_a_line_that_starts_a_statement(line: str) -> None:
    assert START.match(line)


@pytest.mark.parametrize("line", ["  * x[d]", "  x[d] == 3", "", "  # y = 3", "  + f(x = 3)"])
def test_a_line_that_does_not(line: str) -> None:
    assert not START.match(line)


def test_declarations_are_where_a_file_is_cut() -> None:
    (alternatives,) = re.findall(r"^\?declaration: (.*?)\n\n", SOURCE, re.MULTILINE | re.DOTALL)
    words = set(re.findall(r"\w+", alternatives)) - {"const_fn"} | {"edition"}
    assert {w.rstrip("_") for w in words} == set(DECLARATIONS)
