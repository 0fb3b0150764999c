"""From Lark's parse tree to the syntax tree, without recursion (input may nest as it likes)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lark import Token, Tree
from lark.tree import Meta

from dsl import syntax as ast
from dsl.deploy.tree import DeployTree
from dsl.diagnostics import Refused, Source, Span

LARGEST = 2**62  # a larger whole number is a slip
MAX_DIGITS = 40  # and so is a longer one, which Python refuses to print


def _flat(children: list[Any]) -> list[Any]:
    return [c for c in children if c is not None]


class TreeBuilder(DeployTree):
    """One method per grammar rule. ``lines_before`` is where this text starts in its file."""

    def __init__(self, source: Source, lines_before: int = 0):
        self.source = source
        self.before = lines_before

    def transform(self, tree: Tree[Token]) -> ast.File:
        """The file: children first, each node by the method of its rule."""
        waiting: list[Tree[Token] | Token] = [tree]
        order: list[Tree[Token] | Token] = []
        while waiting:
            node = waiting.pop()
            order.append(node)
            if isinstance(node, Tree):
                waiting += node.children
        done: list[Any] = []
        for node in reversed(order):
            if isinstance(node, Tree):
                first = len(done) - len(node.children)
                children = done[first:]
                del done[first:]
                done.append(getattr(self, node.data)(node.meta, children))
            else:
                done.append(node)
        return done[0]

    # -- helpers ---------------------------------------------------------------------------------

    def span(self, meta: Meta | Token) -> Span:
        if isinstance(meta, Meta) and meta.empty:
            return Span(self.source, 1 + self.before, 1, 1 + self.before, 1)
        return Span(
            self.source,
            (meta.line or 1) + self.before,
            meta.column or 1,
            (meta.end_line or 1) + self.before,
            meta.end_column or 1,
        )

    def name(self, token: Token) -> ast.Name:
        return ast.Name(str(token), self.span(token))

    def optional(self, token: Token | None) -> ast.Name | None:
        return None if token is None else self.name(token)

    def _deep(self, span: Span, *parts: Any) -> int:
        depth = 1 + max((p.depth for p in parts if p is not None), default=0)
        if depth > ast.MAX_DEPTH:
            deepest = f"deeper than {ast.MAX_DEPTH} levels"
            raise Refused("E0103", "this is nested too deeply", span, deepest)
        return depth

    # -- file ------------------------------------------------------------------------------------

    def start(self, meta: Meta, children: list[Any]) -> ast.File:
        edition, *declarations = children
        kept = tuple(d for child in declarations for d in _as_list(child))
        return ast.File(edition, kept, frozenset(), self.span(meta))

    def edition(self, meta: Meta, children: list[Any]) -> ast.Name:
        return self.name(children[0])

    def import_(self, meta: Meta, children: list[Any]) -> ast.Import:
        path, *names = children
        return ast.Import(path, tuple(self.name(n) for n in _flat(names)), self.span(meta))

    def path(self, meta: Meta, children: list[Any]) -> ast.Name:
        return ast.Name(".".join(str(c) for c in children), self.span(meta))

    # -- constants -------------------------------------------------------------------------------

    def const(self, meta: Meta, children: list[Any]) -> ast.ConstDecl:
        name, value = children
        keys, default = value if isinstance(value, tuple) else ((), value)
        return ast.ConstDecl(self.name(name), keys, default, self.span(meta))

    def config(self, meta: Meta, children: list[Any]) -> tuple[tuple[str, ...], ast.Expr | None]:
        *keys, default = children
        return tuple(k for k in keys if isinstance(k, str)), default

    def key(self, meta: Meta, children: list[Any]) -> str:
        return ".".join(str(c) for c in children)

    def const_fn(self, meta: Meta, children: list[Any]) -> ast.ConstFn:
        name, *formals, value = children
        kept = tuple(self.name(f) for f in _flat(formals))
        return ast.ConstFn(self.name(name), kept, value, self.span(meta))

    def require_config(self, meta: Meta, children: list[Any]) -> ast.Require:
        keys = tuple(c for c in children if isinstance(c, str))
        allowed = tuple(c for c in children if isinstance(c, ast.Literal))
        return ast.Require(keys, allowed, None, self.span(meta))

    def require_items(self, meta: Meta, children: list[Any]) -> ast.Require:
        key, number, value = children
        items = ast.Items(self.name(number), value)
        return ast.Require((key,), (), None, self.span(meta), items)

    def require_that(self, meta: Meta, children: list[Any]) -> ast.Require:
        return ast.Require((), (), children[0], self.span(meta))

    def literal(self, meta: Meta, children: list[Any]) -> ast.Literal:
        token = children[0]
        if token.type == "NUMBER":
            return self.number(meta, children)
        return self.string(meta, children)

    def negative(self, meta: Meta, children: list[Any]) -> ast.Literal:
        number = self.number(meta, children)
        assert isinstance(number.value, (int, float))
        return ast.Literal(-number.value, self.span(meta))

    def dims(self, meta: Meta, children: list[Any]) -> ast.Dims:
        name, base, default, *settings = children
        kept = tuple(_flat(settings))
        return ast.Dims(
            self.name(name), self.optional(base), default is not None, kept, self.span(meta)
        )

    def default(self, meta: Meta, children: list[Any]) -> bool:
        return True

    def setting(self, meta: Meta, children: list[Any]) -> ast.Setting:
        return ast.Setting(self.name(children[0]), children[1], self.span(meta))

    def names(self, meta: Meta, children: list[Any]) -> ast.Names:
        block, *rest = children
        entries = tuple(c for c in rest if isinstance(c, ast.NameEntry))
        ignored = tuple(literal for c in rest if isinstance(c, tuple) for literal in c)
        return ast.Names(self.name(block), entries, ignored, self.span(meta))

    def name_entry(self, meta: Meta, children: list[Any]) -> ast.NameEntry:
        name, array, text = children
        template = self.string(meta, [text])
        return ast.NameEntry(self.name(name), self.optional(array), template, self.span(meta))

    def ignore(self, meta: Meta, children: list[Any]) -> tuple[ast.Literal, ...]:
        return tuple(ast.Literal(str(t)[1:-1], self.span(t)) for t in children)

    # -- indices ---------------------------------------------------------------------------------

    def index(self, meta: Meta, children: list[Any]) -> list[ast.IndexDecl]:
        return children

    def _index(self, meta: Meta, children: list[Any], kind: str, **rest: Any) -> ast.IndexDecl:
        return ast.IndexDecl(self.name(children[0]), kind, self.span(meta), **rest)

    def index_time(self, meta: Meta, children: list[Any]) -> ast.IndexDecl:
        return self._index(meta, children, "time")

    def index_history(self, meta: Meta, children: list[Any]) -> ast.IndexDecl:
        return self._index(meta, children, "history", of=self.name(children[1]))

    def index_size(self, meta: Meta, children: list[Any]) -> ast.IndexDecl:
        return self._index(meta, children, "size", size=children[1])

    def index_range(self, meta: Meta, children: list[Any]) -> ast.IndexDecl:
        return self._index(meta, children, "range", start=children[1], size=children[2])

    def index_alias(self, meta: Meta, children: list[Any]) -> ast.IndexDecl:
        return self._index(meta, children, "alias", alias=children[1])

    # -- blocks and functions --------------------------------------------------------------------

    def fn(self, meta: Meta, children: list[Any]) -> ast.Fn:
        name, indices, *rest = children
        formals = tuple(c for c in rest if isinstance(c, ast.Formal))
        (result,) = [c for c in rest if isinstance(c, ast.Result)]
        body = _items(rest[rest.index(result) + 1 :])
        return ast.Fn(self.name(name), indices or (), formals, result, body, self.span(meta))

    def extern(self, meta: Meta, children: list[Any]) -> ast.Fn:
        _, *rest = children
        kernels = tuple(c for c in rest if isinstance(c, ast.Kernel))
        made = self.fn(meta, [c for c in rest if not isinstance(c, ast.Kernel)])
        return replace(made, extern=True, kernels=kernels)

    def kernel(self, meta: Meta, children: list[Any]) -> ast.Kernel:
        _, text, *targets = children
        where = str(text)[1:-1]
        file, _, function = where.rpartition(":")
        if not file.endswith(".py") or not function.isidentifier():
            said = 'a kernel is a function of a file: "kernels/file.py:function"'
            raise Refused("E0101", said, self.span(text))
        return ast.Kernel(where, tuple(self.name(t) for t in targets), self.span(meta))

    def block(self, meta: Meta, children: list[Any]) -> ast.Block:
        name, indices, settings, *members = children
        return ast.Block(
            self.name(name),
            indices or (),
            settings or (),
            _items(members),
            self.span(meta),
        )

    def model(self, meta: Meta, children: list[Any]) -> ast.Block:
        name, *members = children
        return ast.Block(self.name(name), (), (), _items(members), self.span(meta), True)

    def formal_indices(self, meta: Meta, children: list[Any]) -> tuple[ast.Name, ...]:
        return tuple(self.name(c) for c in children)

    def settings(self, meta: Meta, children: list[Any]) -> tuple[ast.Setting, ...]:
        return tuple(children)

    def if_member(self, meta: Meta, children: list[Any]) -> ast.If:
        condition, *rest = children
        otherwise: tuple[Any, ...] = ()
        if rest and isinstance(rest[-1], tuple):
            otherwise = rest.pop()
        elif rest and isinstance(rest[-1], _ElseIf):
            otherwise = (rest.pop().item,)
        elif rest and rest[-1] is None:
            rest.pop()
        then, span = _items(rest), self.span(meta)
        nested = [i for i in (*then, *otherwise) if isinstance(i, ast.If)]
        return ast.If(condition, then, otherwise, span, self._deep(span, condition, *nested))

    if_statement = if_member

    def else_members(self, meta: Meta, children: list[Any]) -> tuple[Any, ...]:
        return _items(children)

    else_statements = else_members

    def else_if(self, meta: Meta, children: list[Any]) -> _ElseIf:
        return _ElseIf(children[0])

    def param(self, meta: Meta, children: list[Any]) -> ast.ParamDecl:
        return self._stored(meta, children, "param")

    def state(self, meta: Meta, children: list[Any]) -> ast.ParamDecl:
        return self._stored(meta, children, "state")

    def _stored(self, meta: Meta, children: list[Any], role: str) -> ast.ParamDecl:
        name, subscripts, dtype = children
        return ast.ParamDecl(self.name(name), subscripts or (), dtype, role, self.span(meta))

    def dtype(self, meta: Meta, children: list[Any]) -> ast.Name:
        return self.name(children[0])

    of = dtype

    def use(self, meta: Meta, children: list[Any]) -> list[ast.UseDecl]:
        return children

    def use_item(self, meta: Meta, children: list[Any]) -> ast.UseDecl:
        name, array, block, indices, settings = children
        return ast.UseDecl(
            self.name(name),
            self.optional(array),
            self.name(block),
            indices or (),
            settings or (),
            self.span(meta),
        )

    def def_(self, meta: Meta, children: list[Any]) -> ast.Def:
        name, *rest = children
        span = self.span(meta)
        formals = tuple(c for c in rest if isinstance(c, ast.Formal))
        (result,) = [c for c in rest if isinstance(c, ast.Result)]
        body = _items(rest[rest.index(result) + 1 :])
        head = Span(span.source, span.line, span.column, span.line, span.column + 3)
        named = self.optional(name) or ast.Name("call", head)
        return ast.Def(named, formals, result, body, span)

    def formal(self, meta: Meta, children: list[Any]) -> ast.Formal:
        name, subscripts, of, dtype, value = children
        return ast.Formal(self.name(name), subscripts or (), of, dtype, value, self.span(meta))

    def result(self, meta: Meta, children: list[Any]) -> ast.Result:
        name, subscripts, of, dtype = children
        return ast.Result(self.name(name), subscripts or (), of, dtype, self.span(meta))

    def equation(self, meta: Meta, children: list[Any]) -> ast.Equation:
        kind, name, subscripts, dtype, value = children
        return ast.Equation(
            kind or "plain",
            self.name(name),
            subscripts or (),
            dtype,
            value,
            self.span(meta),
        )

    def scan(self, meta: Meta, children: list[Any]) -> ast.Equation:
        _, name, subscripts, dtype, value, _, start = children
        named, span = self.name(name), self.span(meta)
        return ast.Equation("scan", named, subscripts or (), dtype, value, span, start)

    def let(self, meta: Meta, children: list[Any]) -> str:
        return "let"

    def cached(self, meta: Meta, children: list[Any]) -> str:
        return "cached"

    # -- expressions -----------------------------------------------------------------------------

    def choose(self, meta: Meta, children: list[Any]) -> ast.Choose:
        span = self.span(meta)
        condition, then, otherwise = children
        return ast.Choose(condition, then, otherwise, span, self._deep(span, *children))

    def _binary(self, op: str, meta: Meta, children: list[Any]) -> ast.Binary:
        span = self.span(meta)
        return ast.Binary(
            op, children[0], children[-1], span, self._deep(span, children[0], children[-1])
        )

    def op_or(self, meta: Meta, children: list[Any]) -> ast.Binary:
        return self._binary("or", meta, children)

    def op_and(self, meta: Meta, children: list[Any]) -> ast.Binary:
        return self._binary("and", meta, children)

    def compare(self, meta: Meta, children: list[Any]) -> ast.Binary:
        return self._binary(str(children[1]), meta, children)

    def add(self, meta: Meta, children: list[Any]) -> ast.Binary:
        return self._binary("+", meta, children)

    def sub(self, meta: Meta, children: list[Any]) -> ast.Binary:
        return self._binary("-", meta, children)

    def mul(self, meta: Meta, children: list[Any]) -> ast.Binary:
        return self._binary("*", meta, children)

    def div(self, meta: Meta, children: list[Any]) -> ast.Binary:
        return self._binary("/", meta, children)

    def pow(self, meta: Meta, children: list[Any]) -> ast.Binary:
        return self._binary("^", meta, children)

    def op_not(self, meta: Meta, children: list[Any]) -> ast.Unary:
        span = self.span(meta)
        return ast.Unary("not", children[0], span, self._deep(span, children[0]))

    def neg(self, meta: Meta, children: list[Any]) -> ast.Unary:
        span = self.span(meta)
        return ast.Unary("-", children[0], span, self._deep(span, children[0]))

    def number(self, meta: Meta, children: list[Any]) -> ast.Literal:
        text, span = str(children[0]), self.span(children[0])
        if len(text) > MAX_DIGITS:
            raise Refused(
                "E0104", "this number is too long", span, f"more than {MAX_DIGITS} digits"
            )
        value: int | float = float(text) if set(text) & set(".eE") else int(text)
        if value == math.inf or (isinstance(value, int) and value > LARGEST):
            raise Refused("E0104", "this number is too large", span)
        return ast.Literal(value, span)

    def string(self, meta: Meta, children: list[Any]) -> ast.Literal:
        return ast.Literal(str(children[0])[1:-1], self.span(children[0]))

    def inf(self, meta: Meta, children: list[Any]) -> ast.Literal:
        return ast.Literal(float("inf"), self.span(meta))

    def true_(self, meta: Meta, children: list[Any]) -> ast.Literal:
        return ast.Literal(True, self.span(meta))

    def false_(self, meta: Meta, children: list[Any]) -> ast.Literal:
        return ast.Literal(False, self.span(meta))

    def null_(self, meta: Meta, children: list[Any]) -> ast.Literal:
        return ast.Literal(None, self.span(meta))

    true, false, null = true_, false_, null_

    def target(self, meta: Meta, children: list[Any]) -> tuple[ast.Name, ast.Name | None]:
        return self.name(children[0]), self.optional(children[1])

    def ref(self, meta: Meta, children: list[Any]) -> ast.Ref:
        (name, member), subscripts = children
        span = self.span(meta)
        return ast.Ref(name, member, subscripts, span, self._deep(span, *(subscripts or ())))

    def call(self, meta: Meta, children: list[Any]) -> ast.Call:
        (name, member), subscripts, *arguments = children
        span = self.span(meta)
        kept = tuple(_flat(arguments))
        depth = self._deep(span, *(subscripts or ()), *kept)
        return ast.Call(name, member, subscripts, kept, span, depth)

    def group(self, meta: Meta, children: list[Any]) -> ast.Group:
        span = self.span(meta)
        return ast.Group(tuple(children), span, self._deep(span, *children))

    def subscripts(self, meta: Meta, children: list[Any]) -> tuple[ast.Subscript, ...]:
        return tuple(children)

    def subscript(self, meta: Meta, children: list[Any]) -> ast.Subscript:
        *parts, to = children
        span = self.span(meta)
        return ast.Subscript(tuple(parts), self.optional(to), span, self._deep(span, *parts))


class _ElseIf:
    """``else if``: the nested choice stands where the else part would."""

    def __init__(self, item: ast.If):
        self.item = item


def _as_list(child: Any) -> list[Any]:
    return child if isinstance(child, list) else [] if child is None else [child]


def _items(children: list[Any]) -> tuple[Any, ...]:
    """Members and statements, with ``index a : x, b : y`` and ``use`` lists spread out."""
    return tuple(item for child in children for item in _as_list(child))
