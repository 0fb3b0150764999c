"""Blocks use blocks, functions call functions, defs call defs; none may reach itself."""

from __future__ import annotations

from collections.abc import Iterator

from dsl import syntax as ast
from dsl.diagnostics import Diagnostics, Span
from dsl.files import Library, Unit
from dsl.walking import all_items, calls

DEEPEST = 40  # blocks in blocks, functions in functions
LAYERS = "layers are an array of blocks: use layers[a] = Block[d], run by chain[a](layers, ...)"


def check_recursion(library: Library, found: Diagnostics) -> bool:
    """Report circles of blocks, functions and defs; True if there are none."""
    before = len(found.found)
    _Circles(found).check(library)
    for unit in library.units:
        for declaration in unit.file.declarations:
            if isinstance(declaration, ast.Block):
                _defs(declaration, found)
    return len(found.found) == before


class _Circles:
    """Walks what reaches what, depth first, without Python's own recursion."""

    def __init__(self, found: Diagnostics):
        self.found = found
        self.depth: dict[int, int] = {}  # of what has been looked at: how far down it reaches

    def check(self, library: Library) -> None:
        for unit in library.units:
            for declaration in unit.file.declarations:
                if isinstance(declaration, (ast.Block, ast.Fn)):
                    self._visit(declaration, unit)

    def _visit(self, declaration: ast.Block | ast.Fn, unit: Unit) -> None:
        if id(declaration) in self.depth:
            return
        open_ = {id(declaration): declaration.name.text}
        stack = [(declaration, _reached(declaration, unit))]
        deepest = [1]
        while stack:
            at, targets = stack[-1]
            found = next(targets, None)
            if found is None:
                stack.pop()
                open_.pop(id(at))
                self.depth[id(at)] = depth = deepest.pop()
                if depth == DEEPEST + 1:
                    message = f"'{at.name.text}' reaches more than {DEEPEST} deep"
                    self.found.error("E0509", message, at.name.span)
                if deepest:
                    deepest[-1] = max(deepest[-1], depth + 1)
                continue
            target, home, span = found
            if id(target) in open_:
                names = list(open_.values())[list(open_).index(id(target)) :]
                block = isinstance(target, ast.Block)
                self.found.error(
                    "E0509",
                    f"'{target.name.text}' reaches itself here",
                    span,
                    (" uses " if block else " calls ").join([*names, target.name.text]),
                    notes=[(target.name.span, "declared here")],
                    hint=LAYERS if block else "",
                )
            elif id(target) in self.depth:
                deepest[-1] = max(deepest[-1], self.depth[id(target)] + 1)
            else:
                open_[id(target)] = target.name.text
                stack.append((target, _reached(target, home)))
                deepest.append(1)


def _reached(
    declaration: ast.Block | ast.Fn, unit: Unit
) -> Iterator[tuple[ast.Block | ast.Fn, Unit, Span]]:
    """The blocks that a block uses, or the functions that a function calls, and where."""
    if isinstance(declaration, ast.Block):
        uses = (i for i in all_items(declaration.members) if isinstance(i, ast.UseDecl))
        named = [(use.block.text, use.block.span) for use in uses]
    else:
        named = list(_called(declaration.body))
    for name, span in named:
        target, home = unit.visible.get(name, (None, unit))
        if isinstance(target, (ast.Block, ast.Fn)):
            yield target, home, span


def _defs(block: ast.Block, found: Diagnostics) -> None:
    """Circles of the defs of one block."""
    calls: dict[str, dict[str, Span]] = {}
    for item in all_items(block.members):
        if isinstance(item, ast.Def):
            calls.setdefault(item.name.text, {}).update(_called(item.body))
    for name, called in calls.items():
        reached = dict(called)
        queue = list(called)
        while queue:
            for further in calls.get(queue.pop(), ()):
                if further not in reached:
                    reached[further] = calls[name].get(further) or next(iter(called.values()))
                    queue.append(further)
        if name in reached:
            message = f"the def '{name}' reaches itself here"
            if name == "call":
                message = "the def reaches itself here"
            found.error("E0509", message, reached[name])
            return


def _called(items: tuple[ast.Item, ...]) -> Iterator[tuple[str, Span]]:
    for item in all_items(items):
        if isinstance(item, ast.Equation):
            yield from calls(item.value)
            if item.start is not None:
                yield from calls(item.start)
