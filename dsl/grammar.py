"""The parser, kept between processes: building its tables takes longer than checking any model.

The tables are kept as JSON, which cannot run anything when it is read, in a folder that only its
owner may write to. Without such a folder, or with a damaged file in it, the tables are built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import lark
from lark import Lark
from lark.grammar import Rule
from lark.lexer import TerminalDef

MOST_KEPT = 8  # tables of other versions, so that two installations do not undo each other's


@cache
def grammar() -> Lark:
    """The LALR parser of ``.arch`` files."""
    text = Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8")
    made_with = (text, lark.__version__, sys.version_info[:2])
    key = hashlib.sha256(repr(made_with).encode()).hexdigest()[:32]
    folder = _private_folder()
    path = folder / f"grammar-{key}.json" if folder is not None else None
    if path is not None:
        parser = _read(path)
        if parser is not None:
            return parser
    parser = Lark(
        text, parser="lalr", lexer="contextual", propagate_positions=True, maybe_placeholders=True
    )
    if path is not None:
        _write(path, parser)
    return parser


def _private_folder() -> Path | None:
    """``~/.cache/dslc``, made if need be; None if it is not ours alone."""
    try:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "dslc"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError, ValueError):  # RuntimeError: no home is known
        return None
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        return None
    return folder


def _read(path: Path) -> Lark | None:
    try:
        kept = json.loads(path.read_bytes(), object_hook=_whole_keys)
        return Lark._load_from_dict(kept["data"], kept["memo"])
    except Exception:  # absent or damaged, in whatever way: the tables are built anew
        return None


def _write(path: Path, parser: Lark) -> None:
    """Put the tables beside their predecessors in one step, and clear the oldest away."""
    with suppress(OSError, AttributeError, TypeError, ValueError):  # another lark may know no such
        data, memo = parser.memo_serialize([TerminalDef, Rule])
        handle, name = tempfile.mkstemp(dir=path.parent, prefix="grammar-", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({"data": data, "memo": memo}, out)
        os.replace(name, path)
        kept = sorted(path.parent.glob("grammar-*"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in kept[MOST_KEPT:]:
            old.unlink(missing_ok=True)


def _whole_keys(section: dict[str, Any]) -> dict[Any, Any]:
    """JSON's keys are texts; those of the tables that are numbers become numbers again."""
    return {int(key) if key.isdigit() else key: value for key, value in section.items()}
