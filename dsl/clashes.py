"""Two tensors of one name in a checkpoint: found on patterns, without going through the tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import Protocol

from dsl.diagnostics import Span
from dsl.templates import Numbers, numbered


class Pattern(Protocol):
    """All tensors of one declaration at one place of the module tree: ``compiler/tensors.py``."""

    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def ranges(self) -> tuple[range, ...]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Path:
    """A pattern before anything is compiled."""

    path: str
    name: str
    ranges: tuple[range, ...]

    def __len__(self) -> int:
        return prod(len(r) for r in self.ranges)


def shown(template: str, ranges: Iterable[range]) -> str:
    """A path with its ranges, half-open as in the source: ``layers[3..61].attn``."""
    return template.format(*(_shown_range(r) for r in ranges))


def _shown_range(numbers: range) -> str:
    by = f" by {numbers.step}" if numbers.step > 1 else ""
    return str(numbers.start) if len(numbers) == 1 else f"{numbers.start}..{numbers.stop}{by}"


@dataclass(frozen=True)
class Named:
    """A pattern, and where in the source the parts of its name stand, if that is known."""

    pattern: Pattern
    said: tuple[Span, ...]

    @cached_property
    def parts(self) -> list[str | Numbers]:
        """Texts and numbers in turn; a number that is written out is one too."""
        out: list[str | Numbers] = []
        for part in self._numbered:
            if isinstance(part, Numbers):
                out.append(part)
                continue
            pieces = re.split(r"(\d+)", part)
            out += [Numbers(int(p)) if k % 2 else p for k, p in enumerate(pieces) if p]
        return out

    @cached_property
    def _numbered(self) -> list[str | Numbers]:
        return numbered(self.pattern.name, self.pattern.ranges)

    @property
    def skeleton(self) -> tuple[str | None, ...]:
        return tuple(p if isinstance(p, str) else None for p in self.parts)

    @property
    def numbers(self) -> list[Numbers]:
        return [p for p in self.parts if isinstance(p, Numbers)]

    @cached_property
    def spreads(self) -> list[range]:
        return [n.spread(self.pattern.ranges) for n in self.numbers]

    @property
    def is_plain(self) -> bool:
        """Has each slot a number of its own? Then any combination of the spreads occurs."""
        slots = [slot for n in self.numbers for slot in n.slots]
        return len(slots) == len(set(slots)) and all(len(n.slots) < 2 for n in self.numbers)

    def values(self) -> Iterator[tuple[int, ...]]:
        """The numbers of every tensor."""
        for places in itertools.product(*(range(len(r)) for r in self.pattern.ranges)):
            yield tuple(n.at(places) for n in self.numbers)

    def __str__(self) -> str:
        return shown(self.pattern.path, self.pattern.ranges)

    @property
    def name(self) -> str:
        spreads = [_shown_range(n.spread(self.pattern.ranges)) for n in self._only_numbers]
        return "".join(p if isinstance(p, str) else spreads.pop(0) for p in self._numbered)

    @property
    def _only_numbers(self) -> list[Numbers]:
        return [p for p in self._numbered if isinstance(p, Numbers)]


@dataclass(frozen=True)
class Clash:
    """Tensors of one name: those of two patterns, or of one."""

    message: str
    patterns: tuple[Named, ...]

    @property
    def said(self) -> tuple[Span, ...]:
        """Where the name's parts stand, each once."""
        return tuple(dict.fromkeys(span for named in self.patterns for span in named.said))


def clashes(found: Iterable[Named]) -> Iterator[Clash]:
    """Every two patterns with tensors of one name, and every one with several of one: decided on
    ranges. Only names in which one number is made of those of several arrays are gone through, and
    only where that does not decide it.

    Raises:
        TemplateError: a name has a number that is not whole or below zero.
    """
    alike: dict[tuple[str | None, ...], list[Named]] = {}
    for named in found:
        others = alike.setdefault(named.skeleton, [])
        for other in others:
            if _clash(named, other):
                message = f"{other} and {named} have one name in a checkpoint: {named.name}"
                yield Clash(message, (other, named))
        others.append(named)
        if not _tells_apart(named):
            several = "some of the" if any(n.slots for n in named.numbers) else "all"
            yield Clash(
                f"{several} {len(named.pattern)} of {named} have one name in a checkpoint: "
                f"{named.name}",
                (named,),
            )


def _clash(one: Named, other: Named) -> bool:
    if not all(_meet(a, b) for a, b in zip(one.spreads, other.spreads, strict=True)):
        return False
    if one.is_plain and other.is_plain:
        return True
    return not set(one.values()).isdisjoint(other.values())


def _meet(a: range, b: range) -> bool:
    """Have two progressions a number in common?"""
    common = gcd(a.step, b.step)
    if (b.start - a.start) % common:
        return False
    period = b.step // common
    turns = (b.start - a.start) // common * pow(a.step // common, -1, period) % period
    first, step = a.start + a.step * turns, a.step * period
    low = max(a.start, b.start)
    first += -((first - low) // step) * step if first < low else 0
    return first <= min(a[-1], b[-1])


def _tells_apart(named: Named) -> bool:
    """Have all tensors of a pattern names of their own?"""
    ranges = named.pattern.ranges
    wanted = {slot for slot, numbers in enumerate(ranges) if len(numbers) > 1}
    known: set[int] = set()
    for numbers in sorted(named.numbers, key=lambda n: len(n.slots)):
        reach = 0  # of the smaller steps together: as in a number's digits
        for slot, step in sorted(numbers.steps, key=lambda s: abs(s[1])):
            if slot in known:
                continue
            if abs(step) <= reach:
                break
            reach += abs(step) * (len(ranges[slot]) - 1)
        else:
            known |= numbers.slots
    if wanted <= known:
        return True
    if not wanted <= {slot for n in named.numbers for slot in n.slots}:
        return False
    return len(set(named.values())) == len(named.pattern)
