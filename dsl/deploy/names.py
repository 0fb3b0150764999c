"""What the names in a deployment's rules mean: blocks, indices, arrays, parameters, values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dsl import syntax as ast
from dsl.deploy.syntax import Place
from dsl.deploy.typed import Target
from dsl.diagnostics import Diagnostics, Span, near
from dsl.files import Library, Unit

# Targets of ``shard`` that are no part of the source.
RESERVED = ("batch", "optimizer", "gradients", "parameters")

SPLIT = ("index", "array", "time", "history", "extent")  # what a rule may divide
SELECTED = ("parameter", "array", "use", "block", "value")  # what precision may name
KEPT = ("value", "block", "use", "array")  # what recompute may name

_WORDS = {
    "index": "an index",
    "array": "an array of blocks",
    "use": "a use of one block",
    "parameter": "a parameter",
    "state": "a state",
    "value": "a value",
    "block": "a block",
    "def": "a def",
    "extent": "a constant",
    "time": "a time index",
    "history": "a history",
}


@dataclass
class Part:
    """A block as rules see it: its names, under every outcome of its conditions, by kind."""

    block: ast.Block
    unit: Unit
    names: dict[str, tuple[str, Span]] = field(default_factory=dict)
    chained: set[str] = field(default_factory=set)  # arrays whose blocks run one after the other

    def add(self, name: ast.Name, kind: str) -> None:
        self.names.setdefault(name.text, (kind, name.span))


class Anatomy:
    """A model's blocks: itself and all that it uses."""

    def __init__(self, library: Library, model: ast.Block, unit: Unit):
        self.model = model
        self.parts: dict[str, Part] = {}
        self.broken = {name for u in library.units for name in u.broken}
        self.constants = {
            d.name.text: d.name.span
            for d, _ in library.declarations(ast.ConstDecl)
            if isinstance(d, ast.ConstDecl)
        }
        self.dynamic = {
            name: (i.kind, i.span)
            for u in library.units
            for name, i in u.indices.items()
            if i.kind in ("time", "history")
        }
        queue = [(model, unit)]
        while queue:
            block, home = queue.pop()
            if block.name.text not in self.parts:
                part = self.parts[block.name.text] = _part(block, home)
                for use in _uses(part.block.members):
                    visible = home.visible.get(use.block.text)
                    if visible is not None and isinstance(visible[0], ast.Block):
                        queue.append((visible[0], visible[1]))

    @property
    def own(self) -> Part:
        return self.parts[self.model.name.text]

    def is_broken(self, place: Place) -> bool:
        named = {place.name.text, "*"} | ({place.block.text} if place.block else set())
        return bool(named & self.broken)


def _part(block: ast.Block, unit: Unit) -> Part:
    part = Part(block, unit)
    for index in block.indices:
        part.add(index, "index")
    for member in _every(block.members):
        match member:
            case ast.IndexDecl():
                kind = member.kind if member.kind in ("time", "history") else "index"
                part.add(member.name, kind)
            case ast.ParamDecl():
                part.add(member.name, "parameter" if member.role == "param" else "state")
            case ast.UseDecl():
                part.add(member.name, "use" if member.array is None else "array")
            case ast.Def():
                part.add(member.name, "def")
    for member in _every(block.members):
        if isinstance(member, ast.Def):
            for item in _every(member.body):
                if isinstance(item, ast.IndexDecl):
                    part.add(item.name, "index")
                elif isinstance(item, ast.Equation):
                    part.add(item.name, "value")
                    part.chained.update(_chained(item.value))
    return part


def _every(items: tuple[ast.Item, ...]) -> Iterator[ast.Item]:
    """Members or statements under every outcome of the conditions."""
    for item in items:
        if isinstance(item, ast.If):
            yield from _every(item.then)
            yield from _every(item.otherwise)
        else:
            yield item


def _chained(expr: ast.Expr) -> Iterator[str]:
    """Arrays that ``chain`` runs in an expression."""
    match expr:
        case ast.Call(name=ast.Name(text="chain"), arguments=(ast.Ref(name=array), *_)):
            yield array.text
        case ast.Call(arguments=arguments):
            for argument in arguments:
                yield from _chained(argument)
        case ast.Unary(operand=operand):
            yield from _chained(operand)
        case ast.Binary(left=left, right=right):
            yield from _chained(left)
            yield from _chained(right)
        case ast.Group(items=items):
            for part in (p for item in items for p in item.parts):
                yield from _chained(part)


def _uses(items: tuple[ast.Item, ...]) -> Iterator[ast.UseDecl]:
    return (item for item in _every(items) if isinstance(item, ast.UseDecl))


def shard_target(place: Place, anatomy: Anatomy, found: Diagnostics) -> Target | None:
    """What ``place -> axes`` divides; None after a diagnostic."""
    if place.block is None:
        name = place.name.text
        own = anatomy.own.names.get(name)
        if name in RESERVED:
            return Target(name, None, name, place.span)
        if own is None and name in anatomy.dynamic:
            return Target(anatomy.dynamic[name][0], None, name, place.span)
        if own is None and name in anatomy.constants:
            return Target("extent", None, name, place.span)
    target = _find(place, anatomy, SPLIT, "index or array of blocks", found)
    if target is not None and target.kind == "array":
        part = anatomy.parts[target.block or ""]
        if target.name in part.chained:
            found.error(
                "E0813",
                f"the blocks of '{target.name}' run one after the other and cannot be sharded",
                place.span,
                notes=[(part.names[target.name][1], "declared here")],
                hint=f"spread them over a mesh axis as a pipeline: stages pp : {target.name}",
            )
            return None
    return target


def selected_target(place: Place, anatomy: Anatomy, found: Diagnostics) -> Target | None:
    """What a precision rule names; None after a diagnostic."""
    return _find(place, anatomy, SELECTED, "parameter, use or value", found)


def kept_target(place: Place, anatomy: Anatomy, found: Diagnostics) -> Target | None:
    """What ``recompute`` names; None after a diagnostic."""
    return _find(place, anatomy, KEPT, "value or use", found)


def _find(
    place: Place, anatomy: Anatomy, kinds: tuple[str, ...], what: str, found: Diagnostics
) -> Target | None:
    name = place.name.text
    if place.block is not None:
        part = anatomy.parts.get(place.block.text)
        if part is None:
            if not anatomy.is_broken(place):
                found.error(
                    "E0811",
                    f"'{anatomy.model.name.text}' uses no block called '{place.block.text}'",
                    place.block.span,
                    hint=near(place.block.text, anatomy.parts),
                )
            return None
        return _in(part, place, anatomy, kinds, what, found)
    if "block" in kinds and name in anatomy.parts:
        return Target("block", None, name, place.span)
    own = anatomy.own.names.get(name)
    if own is not None and own[0] in kinds:
        return Target(own[0], anatomy.own.block.name.text, name, place.span)
    homes = [p for p in anatomy.parts.values() if name in p.names]
    fitting = [p for p in homes if p.names[name][0] in kinds]
    if len(fitting) == 1:
        part = fitting[0]
        return Target(part.names[name][0], part.block.name.text, name, place.span)
    if fitting:
        options = sorted(f"{p.block.name.text}.{name}" for p in fitting)
        listed = ", ".join(options[:-1]) + " or " + options[-1]
        found.error(
            "E0812", f"'{name}' stands in several blocks", place.span, hint=f"say which: {listed}"
        )
        return None
    if homes:
        return _in(homes[0], place, anatomy, kinds, what, found)
    if not anatomy.is_broken(place):
        known = [n for p in anatomy.parts.values() for n, (k, _) in p.names.items() if k in kinds]
        extra = [*RESERVED, *anatomy.constants] if "index" in kinds else []
        found.error(
            "E0811",
            f"'{anatomy.model.name.text}' has no {what} called '{name}'",
            place.span,
            hint=near(name, [*known, *extra]) or _example(anatomy, kinds),
        )
    return None


def _in(
    part: Part,
    place: Place,
    anatomy: Anatomy,
    kinds: tuple[str, ...],
    what: str,
    found: Diagnostics,
) -> Target | None:
    block, name = part.block.name.text, place.name.text
    if name not in part.names:
        if not anatomy.is_broken(place):
            known = [n for n, (kind, _) in part.names.items() if kind in kinds]
            found.error(
                "E0811",
                f"'{block}' has no {what} called '{name}'",
                place.name.span,
                notes=[(part.block.name.span, "declared here")],
                hint=near(name, known) or (f"it has {', '.join(known)}" if known else ""),
            )
        return None
    kind, span = part.names[name]
    if kind not in kinds:
        found.error(
            "E0813",
            f"'{name}' of '{block}' is {_WORDS[kind]}, not an {what}"
            if what[0] in "aeiou"
            else f"'{name}' of '{block}' is {_WORDS[kind]}, not a {what}",
            place.name.span,
            notes=[(span, "declared here")],
            hint=_instead(part, kind, kinds),
        )
        return None
    return Target(kind, block, name, place.span)


def _instead(part: Part, kind: str, kinds: tuple[str, ...]) -> str:
    """What to name in its place."""
    block = part.block.name.text
    if "index" in kinds and kind in ("parameter", "state", "value", "use"):
        formal = {i.text for i in part.block.indices}
        indices = [n for n, (k, _) in part.names.items() if k == "index"]
        indices.sort(key=lambda n: n in formal)  # its own first
        return f"name one of its indices: {block}.{indices[0]} -> ..." if indices else ""
    if "index" in kinds and kind == "def":
        return "entry points are placed by stages: ... , mtp with the last"
    return ""


def _example(anatomy: Anatomy, kinds: tuple[str, ...]) -> str:
    for part in anatomy.parts.values():
        for name, (kind, _) in part.names.items():
            if kind == kinds[0] and part is not anatomy.own:
                return f"a target is written Block.name: {part.block.name.text}.{name}"
    return ""
