"""``dslc compare``: where two implementations of a model first differ, by source line."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from compiler.errors import UserError
from dslc.commands.options import add_json, positive
from dslc.commands.run import tokens
from dslc.terminal import note, progress, steps, table

if TYPE_CHECKING:
    from dslc.compare import Comparison, Row
    from dslc.effect import Effect, Error

MOST_ROWS = 12  # of the table; --json has all


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="what dslc compile wrote")
    parser.set_defaults(optional=("other", Path), misuse=parser.error)
    parser.add_argument("other", metavar="DIR_B", nargs="?", type=Path, help="another one")
    parser.add_argument(
        "--with", dest="with_", choices=("transformers",), help="that runs the checkpoint too"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help="a Hugging Face checkpoint; without one, both have the same random weights",
    )
    parser.add_argument(
        "--tokens", metavar="1,2,3", type=tokens, help="what both are run on (random ones)"
    )
    parser.add_argument(
        "--time", metavar="N", type=positive, default=16, help="how many, if random (%(default)s)"
    )
    parser.add_argument(
        "--dtype", metavar="NAME", default="float32", help="that both run in (%(default)s)"
    )
    parser.add_argument("--other-dtype", metavar="NAME", help="that the second runs in instead")
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=float,
        help="of max|a - b| / max|b| (1e-5 in float32, else 2e-2)",
    )
    parser.add_argument(
        "--edited",
        action="store_true",
        help="run model.py as it is, though it was changed since it was compiled",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    if (options.other is None) == (options.with_ is None):
        options.misuse("either DIR_B or --with transformers says what DIR is compared with")
    if options.with_ and options.checkpoint is None:
        raise UserError("--with transformers needs --checkpoint, which both are to run")

    import torch

    from backends.pytorch.load import dtype_of
    from compiler.manifest import read
    from dslc import compare, effect

    first, second = (dtype_of(d) for d in (options.dtype, options.other_dtype or options.dtype))
    short = {first, second} != {torch.float32}
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = compare.LOOSE if short else compare.EXACT
    given = options.tokens or _random_tokens(read(options.directory), options.time)
    name = str(options.other or options.with_)

    def run_one(directory: Path, dtype: torch.dtype) -> compare.Run:
        with progress("loading") as bar:
            return compare.run(
                directory, options.checkpoint, dtype, given, note, options.edited, bar
            )

    if options.other is not None and (pair := _one_quantised(options.directory, options.other)):
        with steps("running") as show:
            show("both")
            measured = effect.effect(*pair, options.checkpoint, first, given, note, options.edited)
        if options.json:
            print(json.dumps({"quantised": str(pair[0]), **asdict(measured), "tokens": given}))
        else:
            _print_effect(measured, *pair, len(given))
        return 0  # reported, not judged
    a = run_one(options.directory, first)
    if options.with_:
        with steps("running") as show:
            show(name)
            found = compare.with_transformers(a, options.checkpoint, second, given, tolerance)
    else:
        found = compare.directories(a, run_one(options.other, second), tolerance)
    if options.json:
        print(json.dumps(as_data(found, given, tolerance)))
    else:
        _print(found, str(options.directory), name, len(given), tolerance)
    return 0 if found.first is None else 1


def _one_quantised(a: Path, b: Path) -> tuple[Path, Path] | None:
    """The directory that was compiled to run on quantised numbers, then the one that was not; None
    if both or neither were."""
    from compiler.manifest import read

    is_a, is_b = (any(row.stored for row in read(d).parameters) for d in (a, b))
    if is_a == is_b:
        return None
    return (a, b) if is_a else (b, a)


def _print_effect(found: Effect, a: Path, b: Path, count: int) -> None:
    print(f"{a} against {b}, {count} tokens; errors are |a - b| / |b|")
    kinds: dict[str, list[Error]] = {}
    for error in found.contractions:
        kinds.setdefault(re.sub(r"\[\d+\]", "[*]", error.path), []).append(error)
    rows = []
    for kind, errors in kinds.items():
        worst = max(errors, key=lambda e: e.error)
        middle = median(e.error for e in errors)
        rows.append((kind, worst.path, f"{len(errors):,}", f"{middle:.2%}", f"{worst.error:.2%}"))
    table(("contraction alone", "worst", "measured", "median", "worst"), rows, left=2)
    layers = [(e.path, f"{e.error:.2%}") for e in found.layers]
    table(("layer alone, fed the same", "error of what it adds"), layers)
    mean, most = found.kl
    kl = f"KL of the next token {mean:.3g} nats on average, {most:.3g} at most"
    picks = f"{found.changed:,} of {found.decisions:,} choices fell otherwise"
    print(f"running freely: logits {found.logits:.2%}; {kl}; {picks}")


def _random_tokens(manifest: object, count: int) -> list[int]:
    import torch

    from compiler.manifest import Manifest

    assert isinstance(manifest, Manifest)
    below = manifest.entries["main"].inputs[0].below or 2
    generator = torch.Generator().manual_seed(0)
    drawn: list[int] = torch.randint(below, (count,), generator=generator).tolist()
    return drawn


def as_data(found: Comparison, given: list[int], tolerance: float) -> dict[str, object]:
    """What ``--json`` prints."""
    first, before = found.first, found.before
    return {
        "equal": first is None,
        "first": asdict(first) if first else None,
        "before": asdict(before) if before else None,
        "values": [asdict(row) for row in found.rows],
        "not_compared": found.alone,
        "logits": asdict(found.logits),
        "greedy_tokens_that_differ": found.greedy,
        "tokens": given,
        "tolerance": tolerance,
    }


def _print(found: Comparison, a: str, b: str, count: int, tolerance: float) -> None:
    first, before = found.first, found.before
    compared = f"{len(found.rows)} values of {a} and {b}, {count} tokens, tolerance {tolerance:g}"
    if found.alone:
        compared += f" ({found.alone} more are in one only)"
    print(f"compared {compared}")
    if first is None:
        worst = max([found.logits, *found.rows], key=lambda row: row.max_rel)
        print(f"no difference: the largest is {worst.max_rel:.2g}, of {worst.path}")
        print(_logits(found, count))
        return
    used = f", used at {first.used_at}" if first.used_at else ""
    print(f"first difference: {first.path} in {first.block}, {first.place}{used}")
    print(f"  {first.equation}")
    if first.other:
        print(f"  in {b}, {first.other}")
    print(f"  max|a - b| {first.max_abs:.3g}, as a part of max|b| {first.max_rel:.3g}")
    if before is not None:
        print(f"  the value before it agrees: {before.path}, {before.place}")
    rest = found.rows[found.rows.index(first) + 1 :] if first in found.rows else []
    later = [row for row in rest if row.differs]
    if later:
        table(
            ("then", "source", "max abs", "max rel"),
            [
                (row.path, row.place, f"{row.max_abs:.3g}", f"{row.max_rel:.3g}")
                for row in later[:MOST_ROWS]
            ],
            left=2,
        )
        if len(later) > MOST_ROWS:
            print(f"and {len(later) - MOST_ROWS} more")
    print(_logits(found, count))


def _logits(found: Comparison, count: int) -> str:
    row: Row = found.logits
    same = "all greedy tokens are the same"
    if found.greedy:
        same = f"{found.greedy} of {count} greedy tokens are others"
    return f"logits: max|a - b| {row.max_abs:.3g}, as a part of max|b| {row.max_rel:.3g}; {same}"
