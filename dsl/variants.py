"""Compile-time choices: the ways that the conditions of a block or function can turn out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from dsl import syntax as ast

Decide = Callable[[ast.Expr], bool]
MOST_VARIANTS = 16  # outcomes of a block's conditions that are checked, all of them up to here


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


def atom_of(condition: ast.Expr) -> tuple[str, bool]:
    """A condition's text without its negations, and whether it was negated."""
    match condition:
        case ast.Unary(op="not", operand=operand):
            text, negated = atom_of(operand)
            return text, not negated
        case ast.Group() if condition.inner is not None:
            return atom_of(condition.inner)
        case ast.Binary(op="!=" | "==" as op, left=left, right=right):
            return f"{left.span.text} == {right.span.text}", op == "!="
    return condition.span.text, False


def variants(items: tuple[ast.Item, ...]) -> list[Decide]:
    """One decision function for each way the conditions can turn out."""
    texts = list(dict.fromkeys(atom_of(c)[0] for c in conditions(items)))
    outcomes = list(
        itertools.islice(itertools.product((True, False), repeat=len(texts)), MOST_VARIANTS)
    )

    def decide_by(outcome: tuple[bool, ...]) -> Decide:
        table = dict(zip(texts, outcome, strict=True))

        def decide(condition: ast.Expr) -> bool:
            text, negated = atom_of(condition)
            return table[text] != negated

        return decide

    return [decide_by(o) for o in outcomes]
