"""Where two implementations of a model first differ, by source line.

Two compiled directories: every named value of the source that both compute, in the order of
execution. A compiled directory and transformers: what blocks return, of those that transformers has
a module for. Which module that is, the checkpoint's names say: all parameters of a block stand
under ``model.layers.3.self_attn``, and so does its module.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backends.pytorch.load import load
from backends.pytorch.watch import Value, watching
from compiler.errors import UserError

if TYPE_CHECKING:
    from backends.pytorch.model import Model
    from compiler.manifest import Manifest

EXACT = 1e-5  # in float32
LOOSE = 2e-2  # where either runs in a shorter dtype
Note = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One value of both. ``max_rel`` is max|a - b| / max|b|; of whole numbers and truth values,
    the part that is not the same. ``used_at`` is where the value's block is called, ``other`` the
    second one's equation where that is another one."""

    path: str
    block: str
    place: str
    equation: str
    max_abs: float
    max_rel: float
    differs: bool
    used_at: str = ""
    other: str = ""


@dataclass(frozen=True)
class Comparison:
    """``rows`` in the order of execution; ``alone`` are values that only one computes, or that have
    another form there; ``greedy`` counts tokens where the largest logit is another one."""

    rows: list[Row]
    logits: Row
    alone: int
    greedy: int

    @property
    def first(self) -> Row | None:
        return next((row for row in [*self.rows, self.logits] if row.differs), None)

    @property
    def before(self) -> Row | None:
        """The last value that agrees before the first that does not."""
        first, last = self.first, None
        for row in self.rows:
            if row is first:
                break
            last = row
        return last if first is not None else None


@dataclass(frozen=True)
class Run:
    """What an implementation computed for one sequence; logits are [time, vocab]."""

    values: list[Value]
    logits: Tensor
    manifest: Manifest


def run(
    directory: Path,
    checkpoint: Path | None,
    dtype: torch.dtype,
    tokens: Sequence[int],
    note: Note,
    edited: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Run a compiled model on one sequence, and keep every named value, but not the model."""
    model: Model = load(
        directory, checkpoint, dtype=dtype, progress=progress, note=note, edited=edited
    )
    with torch.no_grad(), watching(model) as values:
        logits = model(torch.tensor([list(tokens)]))[0]
    return Run(values, logits, model.manifest)


def directories(a: Run, b: Run, tolerance: float) -> Comparison:
    """Compare two runs of compiled models."""
    theirs = dict(_numbered(b.values))
    rows, alone = [], 0
    for key, value in _numbered(a.values):
        other = theirs.pop(key, None)
        row = _row(value, value.path, other.tensor, tolerance) if other is not None else None
        if row is None or other is None:
            alone += 1
            continue
        if other.equation.text != row.equation:
            row = replace(row, other=f"{other.equation.place}: {other.equation.text}")
        rows.append(row)
    return _comparison(rows, alone + len(theirs), a, b.logits, tolerance)


def with_transformers(
    a: Run, checkpoint: Path, dtype: torch.dtype, tokens: Sequence[int], tolerance: float
) -> Comparison:
    """Compare a run with transformers' on the same checkpoint.

    Raises:
        UserError: transformers is not installed, or cannot run this checkpoint.
    """
    model = _transformers(checkpoint, dtype)
    modules = matched(block_names(a.manifest), {n for n, _ in model.named_parameters()})
    outputs: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        def hook(module: object, inputs: object, output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(tensor, Tensor):
                outputs[name].append(tensor.detach().to("cpu", copy=True))

        return hook

    for name in set(modules.values()):
        model.get_submodule(name).register_forward_hook(keep(name))
    try:
        with torch.no_grad():
            logits = model(torch.tensor([list(tokens)])).logits[0].cpu()
    except Exception as error:  # of sizes, say, that its code cannot take
        raise UserError(f"transformers cannot run {checkpoint}: {_first_line(error)}") from error
    rows, alone, calls = [], 0, Counter[str]()
    for value in a.values:
        if not value.result or not value.module:
            continue
        found = outputs.get(modules.get(value.module, ""), [])
        number = calls[value.module]
        calls[value.module] += 1
        row = None
        if number < len(found):
            row = _row(value, value.module, found[number], tolerance)
        if row is None:
            alone += 1
        else:
            rows.append(row)
    return _comparison(rows, alone, a, logits, tolerance)


# -- which module is which block -------------------------------------------------------------------


def block_names(manifest: Manifest) -> dict[str, list[str]]:
    """The checkpoint's names of all tensors below each block, by its path; not of the model."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in manifest.parameters:
        for tensor in row.pattern().tensors():
            block = tensor.path
            while "." in block:
                block = block.rpartition(".")[0]
                found[block].append(tensor.name)
    return found


def matched(blocks: dict[str, list[str]], parameters: Iterable[str]) -> dict[str, str]:
    """transformers' module of each block that has one.

    A module that transformers calls otherwise than the checkpoint (it renames some as it loads) is
    the one beside, under the same parent, that has parameters of the block's names.
    """
    below: dict[str, set[str]] = defaultdict(set)  # of each module, the rest of its tensors' names
    for name in parameters:
        parts = name.split(".")
        for n in range(1, len(parts)):
            below[".".join(parts[:n])].add(".".join(parts[n:]))
    prefixes = {block: _common(names) for block, names in blocks.items()}
    once = {p for p, count in Counter(prefixes.values()).items() if count == 1 and p}
    out = {block: p for block, p in prefixes.items() if p in once and p in below}
    taken = set(out.values())
    for block, prefix in prefixes.items():
        parent = prefix.rpartition(".")[0]
        if prefix not in once or block in out or parent not in taken:
            continue
        own = {name.removeprefix(f"{prefix}.") for name in blocks[block]}
        beside = [
            module
            for module, rest in below.items()
            if module.rpartition(".")[0] == parent and module not in taken and rest & own
        ]
        if len(beside) == 1:
            out[block] = beside[0]
    return out


def _common(names: Sequence[str]) -> str:
    """``a.b`` of ``a.b.c.weight`` and ``a.b.d.weight``; ``a.b`` of ``a.b.weight`` alone."""
    first, last = min(names).split(".")[:-1], max(names).split(".")[:-1]
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return ".".join(first[:same])


# -- transformers ----------------------------------------------------------------------------------


def _transformers(checkpoint: Path, dtype: torch.dtype) -> Any:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise UserError("--with transformers needs it: pip install transformers") from None
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    try:
        try:  # fused experts round otherwise, and refuse odd sizes
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint, experts_implementation="eager", **options
            )
        except (TypeError, ValueError):
            model = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    except Exception as error:  # it raises what its parts raise
        raise UserError(f"transformers cannot load {checkpoint}: {_first_line(error)}") from error
    return model.eval()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# -- comparing -------------------------------------------------------------------------------------


def _numbered(values: Iterable[Value]) -> Iterable[tuple[tuple[str, str, str, int], Value]]:
    """Each value with its place, its name, and how often that was computed before."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for value in values:
        key = (value.module, value.method, value.equation.name)
        yield (*key, seen[key]), value
        seen[key] += 1


def _row(value: Value, path: str, other: Tensor, tolerance: float) -> Row | None:
    found = difference(value.tensor, other)
    if found is None:
        return None
    absolute, relative = found
    equation = value.equation
    return Row(
        path,
        value.block,
        equation.place,
        equation.text,
        absolute,
        relative,
        not relative <= (tolerance if value.tensor.is_floating_point() else 0),
        value.user.place if value.user else "",
    )


def difference(a: Tensor, b: Tensor) -> tuple[float, float] | None:
    """max|a - b|, and as a part of max|b|; None if the two have different forms.

    Infinities of one sign are the same. Of whole numbers and truth values, how many differ, and as
    a part of all.
    """
    a, b = a.squeeze(), b.squeeze()
    if a.shape != b.shape:
        if a.numel() != b.numel() or not a.ndim or not b.ndim or a.shape[0] != b.shape[0]:
            return None
        a, b = a.flatten(1), b.flatten(1)
    if a.is_floating_point() != b.is_floating_point():
        return None
    if not a.numel():
        return 0.0, 0.0
    if not a.is_floating_point():
        wrong = int((a != b).sum())
        return float(wrong), wrong / a.numel()
    a, b = a.double(), b.double()
    apart = torch.where(a == b, 0.0, (a - b).abs())
    finite = b[b.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    worst = float(apart.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
    return worst, worst / largest if largest else (torch.inf if worst else 0.0)


def _comparison(
    rows: list[Row], alone: int, a: Run, theirs: Tensor, tolerance: float
) -> Comparison:
    found = difference(a.logits, theirs)
    if found is None:
        raise UserError(
            f"the logits have other shapes: {list(a.logits.shape)} and {list(theirs.shape)}"
        )
    last = next((v for v in reversed(a.values) if v.result and not v.module), None)
    place, text = (last.equation.place, last.equation.text) if last else ("", "")
    logits = Row("logits", a.manifest.model, place, text, *found, not found[1] <= tolerance)
    greedy = int((a.logits.argmax(-1) != theirs.argmax(-1)).sum())
    return Comparison(rows, logits, alone, greedy)
