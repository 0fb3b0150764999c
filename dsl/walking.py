"""Ways through the syntax tree, and its expressions in one spelling."""

from __future__ import annotations

from collections.abc import Iterator

from dsl import syntax as ast
from dsl.diagnostics import Span


def all_items(items: tuple[ast.Item, ...]) -> Iterator[ast.Item]:
    """Members or statements, whatever their conditions."""
    for item in items:
        if isinstance(item, ast.If):
            yield from all_items(item.then)
            yield from all_items(item.otherwise)
        else:
            yield item


def walk(expr: ast.Expr) -> Iterator[ast.Expr]:
    """An expression and all inside it."""
    stack: list[ast.Expr] = [expr]
    while stack:
        e = stack.pop()
        yield e
        match e:
            case ast.Call(arguments=arguments):
                stack += arguments
            case ast.Unary(operand=operand):
                stack.append(operand)
            case ast.Binary(left=left, right=right):
                stack += [left, right]
            case ast.Choose(condition=c, then=a, otherwise=b):
                stack += [c, a, b]
            case ast.Group(items=groups):
                stack += [part for group in groups for part in group.parts]
        if isinstance(e, (ast.Ref, ast.Call)):
            stack += [part for sub in e.subscripts or () for part in sub.parts]


def calls(expr: ast.Expr) -> Iterator[tuple[str, Span]]:
    """Names called in an expression, without those of used blocks' defs."""
    for e in walk(expr):
        if isinstance(e, ast.Call) and e.member is None:
            yield e.name.text, e.name.span


def sizes(items: tuple[ast.Item, ...]) -> frozenset[str]:
    """The indices whose extents a body asks for."""
    asked: set[str] = set()
    for item in all_items(items):
        values: list[ast.Expr | None] = []
        if isinstance(item, (ast.ConstDecl, ast.Equation)):
            values.append(item.value)
            values.append(item.start if isinstance(item, ast.Equation) else None)
        elif isinstance(item, ast.IndexDecl):
            values += [item.size, item.start]
        for value in values:
            for e in walk(value) if value is not None else ():
                match e:
                    case ast.Call(name=ast.Name(text="size"), arguments=(ast.Ref(name=index),)):
                        asked.add(index.text)
    return frozenset(asked)


def spelled(e: ast.Expr) -> str:
    """An expression's text in one spelling, so that blanks and parentheses make no difference."""
    match e:
        case ast.Literal(value=value):
            return f'"{value}"' if isinstance(value, str) else str(value)
        case ast.Group() if e.inner is not None:
            return spelled(e.inner)
        case ast.Unary(op=op, operand=operand):
            return f"({op} {spelled(operand)})"
        case ast.Binary(op=op, left=left, right=right):
            return f"({spelled(left)} {op} {spelled(right)})"
        case ast.Choose(condition=c, then=a, otherwise=b):
            return f"(if {spelled(c)} then {spelled(a)} else {spelled(b)})"
        case ast.Group(items=items):
            return f"({_subscripts(items)})"
        case ast.Ref() | ast.Call():
            name = e.name.text + (f".{e.member.text}" if e.member else "")
            if e.subscripts is not None:
                name += f"[{_subscripts(e.subscripts)}]"
            if isinstance(e, ast.Call):
                name += f"({', '.join(map(spelled, e.arguments))})"
            return name
    raise AssertionError(e)


def _subscripts(items: tuple[ast.Subscript, ...]) -> str:
    return ",".join(
        "|".join(map(spelled, item.parts)) + (f" -> {item.to.text}" if item.to else "")
        for item in items
    )
