"""Hugging Face checkpoints: which files, which tensors, and whether they are what a model needs.

A checkpoint is a folder with ``*.safetensors`` (and ``model.safetensors.index.json`` where there
are several) and ``config.json``. Nothing in it is executed or unpickled, and no path in an index
may leave the folder. ``match`` finds every mistake before anything is read, in one message.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.pytorch.weights.problems import listing, message, told
from backends.pytorch.weights.stacks import Stacks, find
from backends.pytorch.weights.tensorfile import Reader, Stored, TensorFileError, read_header
from compiler.errors import UserError
from compiler.tensors import Pattern, Tensor

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")
FP8 = "F8_E4M3"
LARGEST_SCALE = np.finfo(np.float32).max / 448  # E4M3's largest code times it is a float32
MOST_COMPARED = 20_000  # pairs of names that are compared for a near miss


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded. ``problems`` has a (name, what is wrong) pair for every
    tensor or file; the message tells them in few lines."""

    def __init__(self, first: str, problems: Sequence[tuple[str, str]] = (), after: str = ""):
        self.problems = tuple(problems)
        super().__init__(message(first, told(problems) + ([after] if after else [])))


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. ``broken`` are files that cannot be read, with the reason."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]
    broken: dict[str, str] = field(default_factory=dict)
    index: dict[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that config.json says the model runs in, if it says one."""
        import torch

        found: torch.dtype | None = getattr(torch, self.dtype_name or "", None)
        return found

    @property
    def dtype_name(self) -> str | None:
        """The same as a word: float32, bfloat16 or float16."""
        named = self.config.get("dtype", self.config.get("torch_dtype"))
        named = named.removeprefix("torch.") if isinstance(named, str) else ""
        return named if named in ("float32", "bfloat16", "float16") else None

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale in FP8 weights, as config.json says."""
        match self.config.get("quantization_config"):
            case {"weight_block_size": [int(rows), int(columns)]} if rows > 0 and columns > 0:
                return rows, columns
        return None


@dataclass(frozen=True)
class Source:
    """Where one tensor of the model comes from; ``scale`` if its bytes are block-scaled FP8."""

    tensor: Tensor
    stored: Stored
    scale: Stored | None = None


@dataclass(frozen=True)
class Match:
    """A checkpoint that fits a model.

    ``unavailable`` says which entries the checkpoint lacks tensors of, and which; ``extra`` are
    tensors that nothing uses and nobody announced.
    """

    checkpoint: Checkpoint
    sources: list[Source]
    unavailable: dict[str, list[str]]
    extra: list[str]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder's index, headers and config.json; no tensor is read.

    Raises:
        CheckpointError: there is no such folder, no safetensors in it, or its JSON is none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    index = _index(folder) if (folder / INDEX).exists() else {}
    names = sorted(set(index.values())) if index else _files_without_index(folder)
    tensors: dict[str, Stored] = {}
    broken: dict[str, str] = {}
    for name in names:
        try:
            found = read_header(folder / name)
        except TensorFileError as error:
            broken[name] = str(error)
            continue
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            broken[name] = f"'{twice[0]}' is in {tensors[twice[0]].file.name} as well"
        tensors.update(found)
    return Checkpoint(folder, config, tensors, broken, index)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def _index(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{folder / INDEX}: 'weight_map' does not map tensors to files")
    outside = []
    for file in sorted(set(index.values())):
        path = PurePosixPath(file)
        # The text decides, not where links lead: download caches keep files behind links.
        if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file or not file:
            outside.append((file, "the index names a file outside of the checkpoint's folder"))
    if outside:
        raise CheckpointError(f"{folder / INDEX} cannot be used:", outside)
    return index


def _files_without_index(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if not names:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        why = f" ({pickled[0]} is a pickle, which can run code: convert it)" if pickled else ""
        raise CheckpointError(f"there are no *.safetensors in {folder}{why}")
    return names


def eos_tokens(folder: Path) -> list[int] | None:
    """The tokens that end a sequence, as generation_config.json or config.json says; None if
    neither does."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            match read_json(folder / name).get("eos_token_id"):
                case int(token):
                    return [token]
                case [*tokens] if tokens and all(isinstance(t, int) for t in tokens):
                    return tokens
    return None


# -- does it fit ----------------------------------------------------------------------------------


def match(
    checkpoint: Checkpoint,
    patterns: Iterable[Pattern],
    ignored: Iterable[str] = (),
    hint: str = "",
) -> Match:
    """Find every tensor of the model in the checkpoint.

    Args:
        patterns: what the model stores; tensors that only entries beside ``main`` read may be
            missing, and those entries are then unavailable.
        ignored: names that a checkpoint may hold beside them; ``{}`` stands for any number.
        hint: what may be behind it if the checkpoint does not fit.

    Raises:
        CheckpointError: one message with everything that is missing, misshaped, wrongly typed, cut
            off or scaled by something that is not a number, expected and found.
    """
    patterns = list(patterns)
    entries = {entry for pattern in patterns for entry in pattern.entries}
    required = {"main"} & entries or entries
    with Reader() as reader:
        matcher = _Matcher(checkpoint, required, reader, Stacks.of(patterns))
        for pattern in patterns:
            for tensor in pattern.tensors():
                if tensor.elements:
                    matcher.find(tensor)
    extra = matcher.extra(ignored)
    problems = matcher.all_problems(extra)
    if problems:
        count = len(problems)
        what = "1 thing is" if count == 1 else f"{count:,} things are"
        raise CheckpointError(
            f"the checkpoint in {checkpoint.folder} does not fit the model: {what} wrong"
            + (f" ({hint})" if hint else ""),
            problems,
            f"not used: {listing(extra, 5)}" if extra else "",
        )
    unavailable = {entry: names for entry, names in matcher.lacking.items() if names}
    sources = [s for s in matcher.sources if _is_needed(s.tensor, unavailable)]
    return Match(checkpoint, sources, unavailable, extra)


def _is_needed(tensor: Tensor, unavailable: dict[str, list[str]]) -> bool:
    entries = tensor.pattern.entries
    return not entries or any(entry not in unavailable for entry in entries)


class _Matcher:
    """Collects what is found, what is lacking and what is wrong."""

    def __init__(self, checkpoint: Checkpoint, required: set[str], reader: Reader, stacks: Stacks):
        self.checkpoint = checkpoint
        self.stacks = stacks
        self.told: set[str] = set()  # stacks with a problem: it is one, however many rows they have
        self.required = required  # entries that must be available
        self.reader = reader
        self.sources: list[Source] = []
        self.problems: list[tuple[str, str]] = list(checkpoint.broken.items())
        self.missing: list[Tensor] = []
        self.lacking: dict[str, list[str]] = {}
        self.used: set[str] = set()

    def find(self, tensor: Tensor) -> None:
        whole, tensors = self.stacks.whole(tensor), self.checkpoint.tensors
        kept = tensors.get(whole.name)
        self.used.add(whole.name)
        if kept is None:
            self._lacks(whole)
            return
        problem = _wrong(whole, kept)
        scale = None
        if kept.dtype == FP8:
            self.used.add(scale_name(whole.name))
        stored = find(tensors, tensor.name)
        if problem is None and stored is not None and stored.dtype == FP8:
            scale = find(tensors, scale_name(tensor.name))
            problem = wrong_scale(self.checkpoint, self.reader, stored, scale)
        if problem and whole.name not in self.told:
            self.problems.append((whole.name, problem))
            self.told.add(whole.name)
        elif not problem and stored is not None:
            self.sources.append(Source(tensor, stored, scale))

    def _lacks(self, tensor: Tensor) -> None:
        broken, index = self.checkpoint.broken, self.checkpoint.index
        if index.get(tensor.name) in broken or (broken and not index):
            return  # said once, of the file that it is, or may be, in
        if tensor.name in self.told:
            return
        self.told.add(tensor.name)
        entries = tensor.pattern.entries
        if self.required.intersection(entries):
            self.missing.append(tensor)
        for entry in entries:
            self.lacking.setdefault(entry, []).append(tensor.name)

    def extra(self, ignored: Iterable[str]) -> list[str]:
        """What nothing uses, without what was announced."""
        known = [re.escape(name).replace(r"\{\}", r"\d+") for name in ignored]
        pattern = re.compile("|".join(f"(?:{k})(?:_scale_inv)?" for k in known) or r"(?!)")
        rest = self.checkpoint.tensors.keys() - self.used
        return sorted(name for name in rest if not pattern.fullmatch(name))

    def all_problems(self, extra: list[str]) -> list[tuple[str, str]]:
        left = MOST_COMPARED
        for tensor in self.missing:
            hint = ""
            if len(extra) <= left:
                left -= len(extra)
                hint = self._near(tensor, extra)
            where = self.checkpoint.index.get(tensor.name)
            found = f"; the index says {where}, which does not hold it" if where else ""
            self.problems.append(
                (tensor.name, f"missing, expected {list(tensor.shape)}{found}{hint}")
            )
        return self.problems

    def _near(self, tensor: Tensor, extra: list[str]) -> str:
        # A tensor of the right shape is the likelier one.
        alike = [n for n in extra if self.checkpoint.tensors[n].shape == tensor.shape]
        for names in (alike, extra):
            close = difflib.get_close_matches(tensor.name, names, n=1, cutoff=0.6)
            if close:
                return f"; is it '{close[0]}' {list(self.checkpoint.tensors[close[0]].shape)}?"
        return ""


def scale_name(name: str) -> str:
    """Where the scales of a block-scaled FP8 tensor stand."""
    return f"{name}_scale_inv"


def wrong_scale(
    checkpoint: Checkpoint, reader: Reader, stored: Stored, scale: Stored | None
) -> str | None:
    """What is wrong with the scales of an FP8 weight; None if nothing is."""
    name = scale_name(stored.name)
    block = checkpoint.block
    if block is None:
        return "is FP8, but config.json has no quantization_config.weight_block_size [R, C]"
    if len(stored.shape) != 2:
        return f"is FP8 {list(stored.shape)}; only matrices have blocks"
    if scale is None:
        return f"is FP8, but its scales '{name}' are missing"
    expected = tuple(ceil(n / b) for n, b in zip(stored.shape, block, strict=True))
    if scale.dtype != "F32" or scale.shape != expected:
        return f"'{name}': expected F32 {list(expected)}, found {scale}"
    if scale.is_cut_off:
        return f"'{name}': {cut_off(scale)}"
    values = np.empty(scale.shape, dtype="<f4")
    reader.read_bytes(scale, values.data.cast("B"))
    for wrong, what in (
        (~np.isfinite(values), "NaN or infinite"),
        (values < 0, "negative, which no quantiser writes"),
        (values > LARGEST_SCALE, "so large that weights would be infinite"),
    ):
        if count := int(wrong.sum()):
            return f"'{name}': {count} of its scales {'is' if count == 1 else 'are'} {what}"
    return None


def _wrong(tensor: Tensor, stored: Stored) -> str | None:
    if stored.shape != tensor.shape:
        return f"expected {list(tensor.shape)}, found {list(stored.shape)}"
    if stored.dtype not in (*FLOATS, FP8):
        return f"expected {', '.join(FLOATS)} or {FP8}, found {stored.dtype}"
    if stored.is_cut_off:
        return cut_off(stored)
    return None


def cut_off(stored: Stored) -> str:
    """What is wrong with a tensor that its file ends within."""
    return (
        f"cut off: expected bytes {stored.start:,} to {stored.start + stored.size:,} of "
        f"{stored.file.name}, found {stored.file_size:,} bytes in all"
    )
