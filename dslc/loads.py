"""How often each block of an array was picked, and where blocks are put for it: two JSON files.

{"model": "DeepSeekV3", "file": "dsv3", "dims": {"hidden": 7168, ...},
 "loads": {"layers.3.mlp.expert": [90, 132, ...], ...}}
{"phy2log": [[5, 6, ...], ...], ..., "arrays": ["layers.3.mlp.expert", ...]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import UserError
from dsl.files import shipped_models

if TYPE_CHECKING:
    from torch import Tensor

    from backends.pytorch.model import Model


@dataclass(frozen=True)
class Loads:
    """Loads of each array of blocks; ``arrays`` are their paths, if they are known, ``file`` is the
    source that they were recorded with, and ``dims`` are the values of its constants."""

    loads: list[list[float]]
    arrays: list[str] | None = None
    file: str | None = None
    dims: dict[str, Any] = field(default_factory=dict)


def counted(model: Model, file: Path | None) -> Any:
    """Within, picks are counted; then written, by one rank for all."""
    return nullcontext() if file is None else _counted(model, file)


@contextmanager
def _counted(model: Model, file: Path) -> Iterator[None]:
    import torch

    from backends.pytorch.runtime.experts import watching
    from backends.pytorch.sharded import ShardedModel

    sizes = _blocks(model)
    found: dict[str, Tensor] = {}

    def watch(path: str, pick: Tensor) -> None:
        counts = torch.bincount(pick.flatten(), minlength=sizes[path])
        found[path] = counts + found[path] if path in found else counts

    with watching(watch):
        yield
    loads = {path: found[path] for path in sorted(found, key=list(sizes).index)}
    if isinstance(model, ShardedModel):
        mesh, batch = model.mesh, model.manifest.batch
        if batch:
            loads = {path: mesh.all_reduce(n, *batch) for path, n in loads.items()}
        if mesh.rank:
            return
    last = Path(model.manifest.sources[-1].name)  # the file that was asked for; imports come first
    shipped = last.parent.name == "models" and last.stem in shipped_models()
    about: dict[str, Any] = {
        "model": model.manifest.model,
        "file": last.stem if shipped else str(last),
    }
    about["dims"] = {k: v for k, v in model.manifest.constants.items() if "." not in k}
    text = json.dumps({**about, "loads": {path: n.tolist() for path, n in loads.items()}})
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def _blocks(model: Model) -> dict[str, int]:
    """How many blocks each array of modules has, over all ranks, by its path."""
    found: dict[str, int] = {}
    for row in model.manifest.parameters:
        for tensor in row.pattern().tensors():
            parts = tensor.path.split("[")
            for at in range(1, len(parts)):
                path = "[".join(parts[:at]).replace("[", ".").replace("]", "")
                number = int(parts[at].split("]")[0])
                found[path] = max(found.get(path, 0), number + 1)
    return found


def read_loads(file: Path) -> Loads:
    """Loads that were recorded; or numbers, or lists of numbers, without names.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    found = _json(file)
    about = found if isinstance(found, dict) else {}
    found = about.get("loads", found)
    arrays = list(found) if isinstance(found, dict) else None
    rows = list(found.values()) if isinstance(found, dict) else found
    if isinstance(rows, list) and rows and all(_is_number(n) for n in rows):
        rows = [rows]
    good = isinstance(rows, list) and rows
    if not good or not all(isinstance(r, list) and r and all(map(_is_number, r)) for r in rows):
        raise UserError(f"{file}: expected loads, a list of numbers for each array of blocks")
    return Loads(rows, arrays, about.get("file"), about.get("dims", {}))


def read_placement(file: Path) -> dict[str, list[int]]:
    """By the path of an array, the block in each place.

    Raises:
        UserError: the file cannot be read, or is no placement with the arrays' names.
    """
    match _json(file):
        case {"phy2log": [*rows], "arrays": [*arrays]} if len(rows) == len(arrays):
            return dict(zip(arrays, rows, strict=True))
    raise UserError(f"{file}: expected a placement with 'phy2log' and 'arrays' (dslc balance -o)")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
