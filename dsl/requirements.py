"""``require``: what config.json or the constants must say for a file to be the right maths."""

from __future__ import annotations

from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dsl import syntax as ast
from dsl.config_keys import config_value
from dsl.constants import Constant, ConstantError, Constants, evaluate, no_size, shown
from dsl.diagnostics import Diagnostics, Span
from dsl.files import Library
from dsl.walking import walk

HISTORY = "history"  # in a requirement: how many positions a sequence has, when it is run


@dataclass(frozen=True)
class Limit:
    """How many positions a sequence may have, and the requirement that says so."""

    positions: int
    span: Span


def most_history(need: ast.Require, constants: Container[str]) -> ast.Expr | None:
    """``N`` of ``require history <= N``: not a condition on constants, but on what is run."""
    match need.condition:
        case ast.Binary(op="<=", left=ast.Ref(name=name, member=None, subscripts=None)):
            if name.text == HISTORY and HISTORY not in constants:
                return need.condition.right
    return None


def limit_of(library: Library, constants: Constants) -> Limit | None:
    """The least of a program's limits; None if sequences may be of any length.

    Raises:
        ConstantError: one is neither a whole number of at least one nor null.
    """
    found: list[Limit] = []
    for need, _ in library.declarations(ast.Require):
        assert isinstance(need, ast.Require)
        most = most_history(need, constants)
        if most is None:
            continue
        try:
            value = evaluate(most, constants.value, no_size, constants.functions)
        except ConstantError as error:
            if error.waits:  # the value comes with a checkpoint
                continue
            raise
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConstantError(
                "E0304",
                f"a number of positions is a whole number of at least one, or null for no limit: "
                f"this is {shown(value)}",
                most.span,
            )
        found.append(Limit(value, need.span))
    return min(found, key=lambda limit: limit.positions, default=None)


def check_requirements(library: Library, constants: Constants, found: Diagnostics) -> None:
    """``require``: what config.json or the constants must say for this file to be the right maths.

    A key that is absent is as it should be; where it holds a list, each of its items is looked at.
    """
    try:
        limit_of(library, constants)
    except ConstantError as error:
        error.report(found)
    for need, _ in library.declarations(ast.Require):
        assert isinstance(need, ast.Require)
        if need.condition is not None:
            if most_history(need, constants) is not None:
                continue
            try:
                if not evaluate(need.condition, constants.value, no_size, constants.functions):
                    found.error(
                        "E0305",
                        f"this does not hold: {need.condition.span.text}",
                        need.condition.span,
                        _values(need.condition, constants),
                    )
            except ConstantError as error:
                if not error.waits:  # the values come with a checkpoint
                    error.report(found)
            continue
        if constants.choices.config is None:
            continue
        if need.items is not None:
            try:
                _check_items(need, need.items, constants, found)
            except ConstantError as error:
                error.report(found)
            continue
        for key in need.keys:
            value = config_value(constants.choices.config, key)
            allowed = [literal.value for literal in need.allowed]
            items = value if isinstance(value, list) else [value]
            other = next(
                (i for i in items if not any(_equal(i, a) for a in (None, *allowed))), None
            )
            if other is None:
                continue
            wanted = " or ".join(shown(a) for a in allowed)
            has = "has" if isinstance(value, list) else "is"
            found.error(
                "E0305",
                f"config.json: {key} {has} {shown(other)}, and this model is written for {wanted}",
                need.span,
                "required here",
            )


def _check_items(
    need: ast.Require, items: ast.Items, constants: Constants, found: Diagnostics
) -> None:
    """The first item of a list that is not what its number says.

    Raises:
        ConstantError: what it must be has no value.
    """
    assert constants.choices.config is not None
    (key,) = need.keys
    value = config_value(constants.choices.config, key)
    if value is None:
        return
    what = ""
    if not isinstance(value, list):
        what = f"{key} is {shown(value)}, and this model is written for a list"
    for number, item in enumerate(value if isinstance(value, list) else ()):

        def of(name: str, span: Span, number: int = number) -> Constant:
            return number if name == items.number.text else constants.value(name, span)

        wanted = evaluate(items.value, of, no_size, constants.functions)
        if not _equal(item, wanted):
            what = (
                f"{key}[{number}] is {shown(item)}, and this model is written for {shown(wanted)}"
            )
            break
    if what:
        found.error("E0305", f"config.json: {what}", need.span, "required here")


def _values(condition: ast.Expr, constants: Constants) -> str:
    """``heads is 6, groups is 4``: what a condition reads."""
    read: dict[str, Constant] = {}
    names = [e.name for e in walk(condition) if isinstance(e, ast.Ref)]
    for name in sorted(names, key=lambda n: (n.span.line, n.span.column)):
        if name.text in constants:
            with suppress(ConstantError):  # where another part decided, this one may have no value
                read[name.text] = constants.value(name.text, name.span)
    return ", ".join(f"{text} is {shown(value)}" for text, value in list(read.items())[:6])


def _equal(value: Any, wanted: Constant) -> bool:
    """1 and 1.0 are the same, 1 and true are not."""
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)
