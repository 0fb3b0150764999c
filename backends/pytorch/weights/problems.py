"""Telling what is wrong with many tensors in few lines.

What is wrong with one tensor of a layer is mostly wrong with that tensor of all layers: tensors
whose names differ in numbers only, and which have the same problem, share a line:
``model.layers.{0..2}.mlp.experts.{0..11}.up_proj.weight (36): expected [17, 29], found [17, 31]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod

LONGEST = 1900  # characters of a message; what is beyond is counted

NUMBER = re.compile(r"(?<=[.\[])\d+(?=[.\]])")


def told(problems: Iterable[tuple[str, str]]) -> list[str]:
    """Lines for (name, problem) pairs, in order; together they name every tensor."""
    groups: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for name, problem in problems:
        numbers = tuple(int(n) for n in NUMBER.findall(name))
        groups.setdefault((NUMBER.sub("{}", name), problem), []).append(numbers)
    lines = []
    for (skeleton, problem), members in groups.items():
        spans = [sorted(set(column)) for column in zip(*members, strict=True)]
        whole = prod(len(span) for span in spans) == len(members)
        if len(members) == 1 or not whole or not all(_adjoining(span) for span in spans):
            lines += [f"{_filled(skeleton, numbers)}: {problem}" for numbers in members]
        else:
            shown = [f"{{{s[0]}..{s[-1]}}}" if len(s) > 1 else s[0] for s in spans]
            lines.append(f"{_filled(skeleton, shown)} ({len(members):,}): {problem}")
    return lines


def message(first: str, lines: list[str]) -> str:
    """The first line, then the others indented, as many as a reader can take in."""
    shown, size = [first], len(first)
    for number, line in enumerate(lines):
        size += len(line) + 3
        if size > LONGEST - 40 and number < len(lines) - 1:
            shown.append(f"  and {len(lines) - number:,} lines more")
            break
        shown.append(f"  {line}"[:LONGEST])
    return "\n".join(shown)


def listing(names: list[str], most: int) -> str:
    """``a, b, c and 5 more``."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def _adjoining(numbers: list[int]) -> bool:
    return numbers[-1] - numbers[0] == len(numbers) - 1


def _filled(skeleton: str, parts: Iterable[object]) -> str:
    # Not str.format: a stored name may hold any character.
    pieces = skeleton.split("{}")
    out = pieces[0]
    for part, piece in zip(parts, pieces[1:], strict=True):
        out += f"{part}{piece}"
    return out
