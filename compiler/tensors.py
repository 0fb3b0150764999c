"""The table of a program's stored tensors: what a checkpoint holds, and which entry needs it.

A program has one row per *pattern*, not per tensor: ``model.layers.{0}.mlp.experts.{1}.up.weight``
with ``{0}`` in 3 .. 61 and ``{1}`` in 0 .. 256 is one row, so that manifests and tables stay as
small as the source, however many layers and experts there are. ``Pattern.tensors`` expands a row.

Checkpoint names are the ``names`` of the modules along the path, joined with dots, empty parts left
out. Where the source says ``model.layers.{2*i + 1}``, a row has ``model.layers.{2 * $0 + 1}``:
``$0`` is the number that ``{0}`` is alone (``dsl/templates.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from compiler.clashes import BadName, NameClash, check_names
from compiler.coding import Coding
from compiler.ir import KEPT, Child, DType, Graph, Module, NamePart, Node, Parameter, Program
from compiler.passes import bounds
from dsl.clashes import Named, shown
from dsl.diagnostics import Span
from dsl.templates import TemplateError, filled, numbered

__all__ = [
    "BadName",
    "CachePattern",
    "NameClash",
    "Pattern",
    "Place",
    "Tensor",
    "caches",
    "called",
    "ignored",
    "patterns",
    "places",
    "shown",
    "tensors",
]

# How random values suit a tensor when there is no checkpoint: what it does, read off the source.
Initial = Literal["matrix", "gain", "shift", "state"]

VIEWS = frozenset({"cast", "expand", "flatten", "part", "rename", "select", "unflatten"})


@dataclass(frozen=True)
class Tensor:
    """One stored tensor. ``dtype`` is "act" (the dtype the model runs in) or a fixed one (f32)."""

    path: str  # in the source: layers[3].mlp.expert[5].W_gate
    name: str  # in the checkpoint: model.layers.3.mlp.experts.5.gate_proj.weight
    shape: tuple[int, ...]
    dtype: DType
    pattern: Pattern

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Pattern:
    """All tensors that one parameter declaration stands for at one place of the module tree.

    ``path`` and ``name`` hold ``{0}``, ``{1}``, ... for the numbers of the arrays on the way there,
    outermost first; ``ranges`` says which numbers these are. ``entries`` are the entry points that
    read the tensor: without those that only ``entries`` beside ``main`` need, a model still loads.
    """

    path: str
    name: str
    ranges: tuple[range, ...]
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: DType
    role: Literal["param", "state"]
    initial: Initial
    entries: tuple[str, ...]
    coding: Coding | None = None  # it is kept as codes and scales

    def __len__(self) -> int:
        return prod(len(r) for r in self.ranges)

    @property
    def elements(self) -> int:
        """Numbers stored, over all tensors of the pattern."""
        return len(self) * prod(self.shape)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, in the order of the arrays."""
        if not len(self):
            return
        name = numbered(self.name, self.ranges)
        for places in itertools.product(*(range(len(r)) for r in self.ranges)):
            path = self.path.format(*(r[k] for r, k in zip(self.ranges, places, strict=True)))
            parts = (p if isinstance(p, str) else str(p.at(places)) for p in name)
            yield Tensor(path, "".join(parts), self.shape, self.dtype, self)


@dataclass(frozen=True)
class CachePattern:
    """What a ``cached`` name of the source keeps: one row per position at each of these places.

    ``dims`` and ``shape`` are of one position, in the order of the source: that order is the
    canonical layout, whatever layout a backend keeps in memory. With ``last``, so many rows are
    kept of each sequence, however long it is: those of its last positions, or the one state of a
    ``scan``.
    """

    path: str  # layers[{0}].attn.c_kv
    ranges: tuple[range, ...]
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: DType
    entries: tuple[str, ...]
    last: int | None = None

    def __len__(self) -> int:
        return prod(len(r) for r in self.ranges)

    @property
    def elements(self) -> int:
        """Numbers kept per position, or per sequence, over all places of the pattern."""
        return len(self) * prod(self.shape) * (1 if self.last is None else self.last)


@dataclass(frozen=True)
class Place:
    """A module of the tree, arrays kept as patterns.

    ``numbers`` are the names that parts of names have for the numbers of the arrays on the way,
    each with its slot; ``said`` is where in the source the parts stand.
    """

    module: Module
    path: str = ""
    name: str = ""
    ranges: tuple[range, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    said: tuple[Span, ...] = ()

    @property
    def key(self) -> tuple[str, tuple[range, ...]]:
        return self.path, self.ranges


def patterns(program: Program) -> list[Pattern]:
    """Every stored tensor of the program, in the order of the source; empty arrays are left out.

    Raises:
        NameClash: two tensors have one checkpoint name.
        BadName: a number in a name is not whole, or below zero.
    """
    reached = _reached(program)
    found: list[Pattern] = []
    named: list[Named] = []
    for place in places(program):
        bodies = [program.bodies[b] for b in place.module.methods.values() if b in program.bodies]
        for parameter in place.module.parameters:
            readers = reached.parameters.get((*place.key, parameter.name), set())
            part = place.module.names.get(parameter.name)
            pattern = Pattern(
                path=_join(place.path, parameter.name),
                name=_join(place.name, _filled(program, place, parameter.name, part)),
                ranges=place.ranges,
                shape=tuple(program.size(d) for d in parameter.type.dims),
                dims=parameter.type.names,
                dtype=parameter.type.dtype,
                role=parameter.role,
                initial=_initial(parameter, bodies),
                entries=tuple(e for e in program.entries if e in readers),
                coding=parameter.coding,
            )
            if len(pattern):
                found.append(pattern)
                named.append(Named(pattern, _said(place, part)))
    check_names(named)
    return found


def tensors(program: Program) -> Iterator[Tensor]:
    """Every stored tensor, one by one: 45,000 of them take a tenth of a second."""
    for pattern in patterns(program):
        yield from pattern.tensors()


def caches(program: Program) -> list[CachePattern]:
    """What the author marked ``cached``, and scans' states, wherever an entry reaches them.

    Args:
        program: as elaborated: passes make a scan give something else than its states.
    """
    found = []
    for (path, ranges, name), (node, entries) in _reached(program).caches.items():
        kept = [d for d in node.type.dims if d.kind not in ("history", "time")]
        last = 1 if node.op == "scan" else bounds.kept(node, program.sizes)
        pattern = CachePattern(
            path=_join(path, name),
            ranges=ranges,
            dims=tuple(d.name for d in kept),
            shape=tuple(program.size(d) for d in kept),
            dtype=node.type.dtype,
            entries=tuple(e for e in program.entries if e in entries),
            last=last,
        )
        if len(pattern):
            found.append(pattern)
    return found


def places(program: Program) -> Iterator[Place]:
    """The module tree, outermost first; parameters of a module come before its children's."""

    def walk(place: Place) -> Iterator[Place]:
        yield place
        for child in place.module.children:
            yield from walk(child_place(program, place, child))

    yield from walk(Place(program.modules[program.root]))


def child_place(program: Program, parent: Place, child: Child) -> Place:
    """Where a child stands. An array adds one number to the path and to the name.

    Raises:
        BadName: its part of the name is none.
    """
    module = program.modules[child.module]
    part = parent.module.names.get(child.name)
    said = _said(parent, part)
    if child.array is None:
        name = _join(parent.name, _filled(program, parent, child.name, part))
        path = _join(parent.path, child.name)
        return Place(module, path, name, parent.ranges, parent.numbers, said)
    slot = len(parent.ranges)
    numbers = {**parent.numbers, part.number: slot} if part and part.number else parent.numbers
    start = child.array.start.at(program.sizes)
    place = Place(
        module,
        _join(parent.path, f"{child.name}[{{{slot}}}]"),
        "",
        (*parent.ranges, range(start, start + program.size(child.array))),
        numbers,
        said,
    )
    own = _filled(program, place, child.name, part) if part else f"{child.name}.{{{slot}}}"
    return replace(place, name=_join(parent.name, own))


def _filled(program: Program, place: Place, member: str, part: NamePart | None) -> str:
    """A member's part of names: as ``names`` says, else what it is called."""
    if part is None:
        return member
    try:
        return filled(part.template, place.numbers, program.constants)
    except TemplateError as error:
        where = f" ({part.span})" if part.span else ""
        raise BadName(f"the name of '{member}' in a checkpoint{where}: {error}") from None


def _said(place: Place, part: NamePart | None) -> tuple[Span, ...]:
    return (*place.said, part.span) if part and part.span else place.said


def ignored(program: Program) -> tuple[str, ...]:
    """Checkpoint tensors that the model knows of and does not need; ``{}`` is any number."""
    root = Place(program.modules[program.root])

    def fill(text: str) -> str:
        return _filled(program, root, program.name, NamePart(text))

    return tuple("{}".join(fill(text) for text in name.split("{}")) for name in program.ignored)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


# -- which entry reads what -----------------------------------------------------------------------


Member = tuple[str, tuple[range, ...], str]  # a place's path and ranges, a name in its module


@dataclass
class _Reached:
    """Which entries read a parameter, and which keep a cache or a state."""

    parameters: dict[Member, set[str]] = field(default_factory=dict)
    caches: dict[Member, tuple[Node, set[str]]] = field(default_factory=dict)
    seen: set[tuple[Member, str]] = field(default_factory=set)


def _reached(program: Program) -> _Reached:
    reached = _Reached()
    root = Place(program.modules[program.root])
    for entry in program.entries.values():
        _visit(program, reached, entry.name, root, entry.body)
    return reached


def _visit(program: Program, reached: _Reached, entry: str, place: Place, body: str) -> None:
    if ((*place.key, body), entry) in reached.seen:
        return
    reached.seen.add(((*place.key, body), entry))
    for node in program.bodies[body]:
        if node.op in ("param", "state"):
            key = (*place.key, str(node.attrs["param"]))
            reached.parameters.setdefault(key, set()).add(entry)
        elif node.op in KEPT:
            key = (*place.key, str(node.attrs["name"]))
            reached.caches.setdefault(key, (node, set()))[1].add(entry)
        for inner, inner_body in called(program, place, node):
            _visit(program, reached, entry, inner, inner_body)


def called(program: Program, place: Place, node: Node) -> Iterator[tuple[Place, str]]:
    """The bodies that a node runs, each with the place whose module it runs in."""
    if node.op not in ("call", "chain", "apply"):  # a branch or a composite: the same module
        for value in node.attrs.values():
            if isinstance(value, str) and value in program.bodies:
                yield place, value
        return
    body, name = str(node.attrs["body"]), node.attrs["child"]
    if not name:
        yield place, body
        return
    for child in place.module.children:
        if child.name != name:
            continue
        inner = child_place(program, place, child)
        if node.op == "chain":  # an array in pieces: this loop runs over some of them
            index = node.attrs["index"]
            start = index.start.at(program.sizes)
            here = inner.ranges[-1]
            if not (here.start < start + program.size(index) and start < here.stop):
                continue
        yield inner, body


# -- what a tensor does ---------------------------------------------------------------------------


def _initial(parameter: Parameter, bodies: list[Graph]) -> Initial:
    """Matrices mix, vectors that are added shift, other vectors scale; states start small."""
    if parameter.role == "state":
        return "state"
    if len(parameter.type.dims) > 1:
        return "matrix"
    for body in bodies:
        for node in body:
            if node.op == "param" and node.attrs["param"] == parameter.name:
                return "shift" if _is_added(body, node) else "gain"
    return "gain"


def _is_added(body: Graph, node: Node) -> bool:
    for user in body.users(node.name):
        if user.op == "map" and user.attrs["fn"] in ("add", "sub"):
            return True
        if user.op in VIEWS and _is_added(body, user):
            return True
    return False
