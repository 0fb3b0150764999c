"""Compile-time choices: the ways that the conditions of a block or function can turn out.

A block is checked once for each way. Conditions that speak of the same thing are decided together
(``kind == "a"`` and ``kind == "b"`` never both hold), so that no way is checked that cannot be.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

from dsl import syntax as ast
from dsl.walking import spelled

Decide = Callable[[ast.Expr], bool]
MOST_VARIANTS = 16  # all ways are checked up to here, of more a selection; see _outcomes

# Stand for a text and a number that no condition names.
OTHER_TEXT = "\0"
_ORDER: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


def flatten(items: tuple[ast.Item, ...], decide: Decide) -> Iterator[ast.Item]:
    """Members or statements with the compile-time choices made."""
    for item in items:
        if isinstance(item, ast.If):
            yield from flatten(item.then if decide(item.condition) else item.otherwise, decide)
        else:
            yield item


def conditions(items: tuple[ast.Item, ...]) -> Iterator[ast.Expr]:
    """Every condition of compile-time ``if``s in members or statements."""
    for item in items:
        if isinstance(item, ast.If):
            yield item.condition
            yield from conditions(item.then)
            yield from conditions(item.otherwise)
        elif isinstance(item, ast.Def):
            yield from conditions(item.body)


def conditional(items: tuple[ast.Item, ...]) -> Iterator[tuple[ast.Item, ast.Expr]]:
    """What stands under a condition, with the innermost one."""
    for item in items:
        if isinstance(item, ast.If):
            for inner in (*item.then, *item.otherwise):
                if not isinstance(inner, ast.If):
                    yield inner, item.condition
            yield from conditional(item.then)
            yield from conditional(item.otherwise)
        elif isinstance(item, ast.Def):
            yield from conditional(item.body)


# -- the questions that conditions ask -------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """``subject op literal``, or, without an operator, whether ``subject`` holds."""

    subject: str
    op: str = ""
    literal: int | float | str | bool | None = None

    def answer(self, value: object) -> bool:
        """What it comes to where the subject is ``value``."""
        if not self.op:
            return bool(value)
        if self.op in _ORDER:
            assert _is_number(self.literal)
            return _is_number(value) and _ORDER[self.op](value, self.literal)
        same = value == self.literal and isinstance(value, bool) == isinstance(self.literal, bool)
        return same == (self.op == "==")


def questions(condition: ast.Expr) -> Iterator[Question]:
    """What a condition asks of the constants, its ``and``, ``or`` and ``not`` taken apart."""
    match condition:
        case ast.Unary(op="not", operand=operand):
            yield from questions(operand)
        case ast.Binary(op="and" | "or", left=left, right=right):
            yield from questions(left)
            yield from questions(right)
        case ast.Group() if condition.inner is not None:
            yield from questions(condition.inner)
        case ast.Literal():
            pass
        case _:
            yield _question(condition)


def _question(atom: ast.Expr) -> Question:
    if isinstance(atom, ast.Binary) and atom.op in _MIRRORED:
        for subject, op, other in (
            (atom.left, atom.op, atom.right),
            (atom.right, _MIRRORED[atom.op], atom.left),
        ):
            if isinstance(other, ast.Literal):
                if op in _ORDER and not _is_number(other.value):
                    break
                return Question(spelled(subject), op, other.value)
    return Question(spelled(atom))


def _holds(condition: ast.Expr, known: dict[str, object]) -> bool:
    match condition:
        case ast.Unary(op="not", operand=operand):
            return not _holds(operand, known)
        case ast.Binary(op="and", left=left, right=right):
            return _holds(left, known) and _holds(right, known)
        case ast.Binary(op="or", left=left, right=right):
            return _holds(left, known) or _holds(right, known)
        case ast.Group() if condition.inner is not None:
            return _holds(condition.inner, known)
        case ast.Literal(value=value):
            return bool(value)
    question = _question(condition)
    return question.answer(known[question.subject])


# -- the ways they can turn out --------------------------------------------------------------------


def variants(items: tuple[ast.Item, ...]) -> list[Decide]:
    """One decision function for each way the conditions can turn out."""
    asked: dict[str, list[Question]] = {}
    for condition in conditions(items):
        for question in questions(condition):
            asked.setdefault(question.subject, []).append(question)
    subjects = list(asked)
    values = [_values(list(dict.fromkeys(qs))) for qs in asked.values()]

    def decide_by(outcome: tuple[object, ...]) -> Decide:
        known = dict(zip(subjects, outcome, strict=True))
        return lambda condition: _holds(condition, known)

    return [decide_by(o) for o in _outcomes(values)]


def _values(asked: list[Question]) -> list[object]:
    """Values of a subject that answer its questions in every way they can be answered together."""
    literals = [q.literal for q in asked if q.op][:MOST_VARIANTS]
    numbers = sorted({v for v in literals if _is_number(v)})
    candidates: list[object] = [v for v in literals if not _is_number(v)]
    if any(not q.op for q in asked):
        candidates += [True, False]
    if numbers:
        candidates += [*numbers, numbers[0] - 1, numbers[-1] + 1]
        candidates += [(a + b) / 2 for a, b in itertools.pairwise(numbers)]
    elif any(q.op for q in asked):
        candidates.append(OTHER_TEXT)
    asked = asked[: 4 * MOST_VARIANTS]
    by_answers = {tuple(q.answer(v) for q in asked): v for v in reversed(candidates)}
    return sorted(by_answers.values(), key=lambda v: [not q.answer(v) for q in asked])


def _outcomes(values: list[list[object]]) -> list[tuple[object, ...]]:
    """All combinations if there are few. Of many: the first and the last value of every subject
    together, each other value alone among those, and for any two subjects both ways of two."""
    number = 1
    for options in values:
        number *= len(options)
        if number > MOST_VARIANTS:
            break
    else:
        return list(itertools.product(*values))
    chosen = {tuple(v[0] for v in values): None, tuple(v[-1] for v in values): None}
    for bit in range(len(values).bit_length()):
        for flip in (0, 1):
            row = (v[-1 if (n >> bit ^ flip) & 1 else 0] for n, v in enumerate(values))
            chosen[tuple(row)] = None
    if len(values) <= 2 * MOST_VARIANTS:
        for base in list(chosen)[:2]:
            for n, options in enumerate(values):
                for option in options:
                    chosen[(*base[:n], option, *base[n + 1 :])] = None
    return list(chosen)[: 4 * MOST_VARIANTS]


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
