"""Checks ``names``: where a checkpoint keeps the tensors of a block.

What a name says is read by ``dsl/templates.py``. Which arrays stand around a block is known where
the block is used, so ``check_tensors`` goes down from the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dsl import syntax as ast
from dsl.diagnostics import Diagnostics, Span, near
from dsl.files import Library, Unit, exporter
from dsl.instances import Instance, Instances
from dsl.templates import Numbers, Placeholder, TemplateError, filled, numbered, parts
from dsl.walking import all_items

MOST_PLACES = 20_000  # of the tree of uses that are looked at


def check_names(
    library: Library, constants: Collection[str], found: Diagnostics
) -> dict[str, ast.Names]:
    """The names of each block type. The file that was asked for has the last word."""
    out: dict[str, tuple[ast.Names, Unit]] = {}
    known = {*constants, *_numbers(library)} if _has_model(library) else None
    for declaration, unit in library.declarations(ast.Names):
        assert isinstance(declaration, ast.Names)
        name = declaration.block.text
        target, home = unit.visible.get(name, (None, unit))
        if not isinstance(target, ast.Block):
            if name not in unit.broken and "*" not in unit.broken:
                blocks = [n for n, (d, _) in unit.visible.items() if isinstance(d, ast.Block)]
                hint = exporter(name) or near(name, blocks)
                found.error("E0205", f"'{name}' is no block", declaration.block.span, hint=hint)
            continue
        before = out.get(name)
        if before is not None and before[1] is unit:
            found.error(
                "E0203",
                f"the names of '{name}' are declared twice",
                declaration.block.span,
                notes=[(before[0].block.span, "first declared here")],
            )
        _entries(declaration, target, home, known, found)
        for literal in declaration.ignored:
            for text in str(literal.value).split("{}"):  # any number
                _template(literal, text, constants, found)
        out[name] = (declaration, unit)
    return {name: declaration for name, (declaration, _) in out.items()}


def _entries(
    names: ast.Names,
    block: ast.Block,
    home: Unit,
    known: Collection[str] | None,
    found: Diagnostics,
) -> None:
    members = {
        m.name.text: isinstance(m, ast.UseDecl) and m.array is not None
        for m in all_items(block.members)
        if isinstance(m, (ast.ParamDecl, ast.UseDecl))
    }
    seen: dict[str, Span] = {}
    for entry in names.entries:
        name, span = entry.name.text, entry.name.span
        if name in seen:
            first = [(seen[name], "first named here")]
            found.error("E0203", f"'{name}' is named twice", span, notes=first)
        seen[name] = span
        if name not in members:
            if name not in home.broken:
                found.error(
                    "E0701",
                    f"'{block.name.text}' has no parameter or use called '{name}'",
                    span,
                    notes=[(block.name.span, "declared here")],
                    hint=near(name, members),
                )
            continue
        if members[name] != (entry.array is not None):
            wanted = f'{name}[i] = "...{{i}}"' if members[name] else f'{name} = "..."'
            what = "is an array of blocks" if members[name] else "is not an array of blocks"
            found.error("E0702", f"'{name}' {what}", span, hint=f"write {wanted}")
            continue
        _template(entry.template, str(entry.template.value), known, found)


def _template(
    literal: ast.Literal, text: str, known: Collection[str] | None, found: Diagnostics
) -> None:
    """``known`` is what may stand in braces, if that can be said."""
    try:
        expressions = [p for p in parts(text) if isinstance(p, Placeholder)]
    except TemplateError as error:
        found.error("E0702", str(error), literal.span)
        return
    for name in dict.fromkeys(n for e in expressions for n in e.names):
        if known is not None and name not in known:
            _unknown(name, known, literal, found)


def _unknown(
    name: str,
    known: Collection[str],
    literal: ast.Literal,
    found: Diagnostics,
    user: Span | None = None,
) -> None:
    what = f"'{{{name}}}' is neither a constant nor the number of an array around it"
    notes = [(user, "used here")]
    found.error("E0702", what, literal.span, hint=near(name, known), notes=notes)


def _numbers(library: Library) -> set[str]:
    """What the numbers of arrays are called anywhere."""
    all_names = [d for d, _ in library.declarations(ast.Names) if isinstance(d, ast.Names)]
    return {e.array.text for d in all_names for e in d.entries if e.array is not None}


def _has_model(library: Library) -> bool:
    blocks = (d for d, _ in library.declarations(ast.Block) if isinstance(d, ast.Block))
    return any(d.is_model for d in blocks)


# -- along the uses -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Array:
    """An array on the way to a tensor, whose number has a name."""

    block: str
    name: str
    number: str
    numbers: range


def check_tensors(
    instances: Instances, root: Instance, names: Mapping[str, ast.Names], found: Diagnostics
) -> None:
    """The names of all tensors of a model whose sizes are known: every name in braces has a value
    that is a whole number, and the number of every array stands in the names of what it holds."""
    _Tensors(instances, names, found).visit(root, {}, frozenset(), None)


class _Tensors:
    def __init__(self, instances: Instances, names: Mapping[str, ast.Names], found: Diagnostics):
        self.instances = instances
        self.names = names
        self.found = found
        self.seen: set[object] = set()

    def visit(
        self,
        instance: Instance,
        around: Mapping[str, _Array],
        silent: frozenset[_Array],
        user: Span | None,
    ) -> None:
        """Look at what is below a block.

        Args:
            around: the arrays on the way, each by the name that is nearest for its number.
            silent: those of several places whose numbers stand in no part of the name yet.
            user: the use that is followed.
        """
        key = (instance.name, tuple(around.items()), silent)
        if key in self.seen or len(self.seen) > MOST_PLACES:
            return
        self.seen.add(key)
        block = instance.block
        mapped = self.names.get(block.name)
        entries = {e.name.text: e for e in mapped.entries} if mapped else {}
        for stored in block.stored:
            self._told(silent - self._spoken(entries.get(stored.name), around, user))
        for use in block.uses:
            inside, still = dict(around), silent
            entry = entries.get(use.name)
            if use.array is not None:
                start = instance.extent(use.array.start).at(self.instances.sizes)
                count = instance.extent(use.array.extent).at(self.instances.sizes)
                if not count:
                    continue
                if entry is not None and entry.array is not None:
                    number = entry.array.text
                    array = _Array(block.name, use.name, number, range(start, start + count))
                    inside[number] = array
                    still |= {array} if count > 1 else set()
            still -= self._spoken(entry, inside, user)
            self.visit(self.instances.used(instance, use), inside, still, use.span)

    def _spoken(
        self, entry: ast.NameEntry | None, around: Mapping[str, _Array], user: Span | None
    ) -> set[_Array]:
        """The arrays whose numbers stand in a part of a name."""
        if entry is None:
            return set()
        arrays, values = list(around.values()), self.instances.values
        slots = {name: slot for slot, name in enumerate(around)}
        template = str(entry.template.value)
        expressions = [p for p in parts(template) if isinstance(p, Placeholder)]
        for name in dict.fromkeys(n for e in expressions for n in e.names):
            if name in slots or name in values:
                continue
            if name not in self.instances.constants.declared:
                _unknown(name, [*slots, *values], entry.template, self.found, user)
            return set(arrays)  # a constant without a value may wait for a checkpoint
        try:
            made = numbered(filled(template, slots, values), [a.numbers for a in arrays])
        except TemplateError as error:
            self.found.error("E0702", str(error), entry.template.span)
            return set(arrays)
        slots_in = {slot for part in made if isinstance(part, Numbers) for slot in part.slots}
        return {arrays[slot] for slot in slots_in}

    def _told(self, silent: frozenset[_Array]) -> None:
        for array in silent:
            entry = next(e for e in self.names[array.block].entries if e.name.text == array.name)
            self.found.error(
                "E0702",
                f"this name does not say where the number of '{array.name}' stands",
                entry.template.span,
                hint=f"write {{{array.number}}} in it, or in every name below it",
            )
