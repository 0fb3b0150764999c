"""No two tensors of a model have one name in a checkpoint: found before anything is compiled.

The names are put together as ``compiler/tensors.py`` does: the parts along the path of uses, joined
with dots, arrays kept as ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

from dsl import syntax as ast
from dsl import typed
from dsl.clashes import Clash, Named, Path, clashes
from dsl.diagnostics import Diagnostics, Span
from dsl.instances import Instance, Instances
from dsl.templates import TemplateError, filled

MOST_PLACES = 20_000  # of the tree of uses that are looked at
MOST_TENSORS = 200_000  # of one declaration: more are a slip, which the compiler looks at
MOST_CLASHES = 1_000


@dataclass(frozen=True)
class _Place:
    """A block of the tree. ``numbers`` are the slots of arrays by their names in braces; ``said``
    is where the parts of its name stand."""

    path: str = ""
    name: str = ""
    ranges: tuple[range, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    said: tuple[Span, ...] = ()


def check_clashes(
    instances: Instances, root: Instance, names: Mapping[str, ast.Names], found: Diagnostics
) -> None:
    """Two tensors of one name, in a model whose sizes are known and whose names can be made."""
    try:
        tensors = list(_tensors(instances, root, names))
        together = list(islice(clashes([named for named, _ in tensors]), MOST_CLASHES))
    except TemplateError:
        return  # a constant without a value may wait for a checkpoint
    declared = {id(named): span for named, span in tensors}  # where the parameter stands
    told: set[tuple[Span, ...]] = set()
    for clash in together:
        places = _apart(clash) or clash.said or tuple(declared[id(n)] for n in clash.patterns)
        if places in told:
            continue  # the next parameter of the same two blocks
        told.add(places)
        last, *others = sorted(places, key=_order, reverse=True)
        found.error(
            "E0703",
            clash.message,
            last,
            notes=[(span, "a part of such a name, too") for span in reversed(others)],
            hint="tell them apart by a text, or by the number of an array",
        )


def _apart(clash: Clash) -> tuple[Span, ...]:
    """What the names of two patterns do not share."""
    one, *other = (set(named.said) for named in clash.patterns)
    return tuple(p for p in clash.said if other and (p in one) != (p in other[0]))


def _order(span: Span) -> tuple[str, int, int]:
    return span.source.name, span.line, span.column


def _tensors(
    instances: Instances, root: Instance, names: Mapping[str, ast.Names]
) -> Iterator[tuple[Named, Span]]:
    todo = [(root, _Place())]
    looked = 0
    while todo and looked <= MOST_PLACES:
        instance, place = todo.pop()
        looked += 1
        block = instance.block
        mapped = names.get(block.name)
        entries = {e.name.text: e for e in mapped.entries} if mapped else {}
        for stored in block.stored:
            entry = entries.get(stored.name)
            made = Path(
                _join(place.path, stored.name),
                _join(place.name, _part(instances, place, stored.name, entry)),
                place.ranges,
            )
            if 0 < len(made) <= MOST_TENSORS:
                yield Named(made, _said(place, entry)), stored.span
        below = [_below(instances, instance, place, use, entries) for use in block.uses]
        todo += reversed(below)


def _below(
    instances: Instances,
    instance: Instance,
    place: _Place,
    use: typed.Use,
    entries: Mapping[str, ast.NameEntry],
) -> tuple[Instance, _Place]:
    entry = entries.get(use.name)
    inside = replace(place, path=_join(place.path, use.name), said=_said(place, entry))
    part = use.name
    if use.array is not None:
        slot = len(place.ranges)
        start = instance.extent(use.array.start).at(instances.sizes)
        count = instance.extent(use.array.extent).at(instances.sizes)
        bound = {entry.array.text: slot} if entry is not None and entry.array is not None else {}
        inside = replace(
            inside,
            path=f"{inside.path}[{{{slot}}}]",
            ranges=(*place.ranges, range(start, start + count)),
            numbers={**place.numbers, **bound},
        )
        part = f"{use.name}.{{{slot}}}"
    name = part if entry is None else _part(instances, inside, use.name, entry)
    return instances.used(instance, use), replace(inside, name=_join(place.name, name))


def _part(instances: Instances, place: _Place, member: str, entry: ast.NameEntry | None) -> str:
    """A member's part of names: as ``names`` says, else what it is called."""
    if entry is None:
        return member
    return filled(str(entry.template.value), place.numbers, instances.values)


def _said(place: _Place, entry: ast.NameEntry | None) -> tuple[Span, ...]:
    return (*place.said, entry.template.span) if entry is not None else place.said


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
