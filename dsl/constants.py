"""Compile-time values: constants, where they come from, and the extents made of them.

A constant is a number, a truth value, a text or null. Its value comes, in this order, from
``--set``, the checkpoint's ``config.json``, a chosen preset, the default preset (only where no
checkpoint is given: the sizes of the published model are not those of somebody's checkpoint), and
its declaration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsl import syntax as ast
from dsl.config_keys import config_value, not_a_section
from dsl.diagnostics import Diagnostics, Span, near
from dsl.extents import Extent, ExtentError

Constant = int | float | bool | str | None
LARGEST = 2**62  # a larger whole number is a slip, and powers of powers must not hang
MOST_CALLS = 1000  # of const functions, for one value

FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "log": (1, math.log),
    "exp": (1, math.exp),
    "sqrt": (1, math.sqrt),
    "sin": (1, math.sin),
    "cos": (1, math.cos),
    "floor": (1, math.floor),
    "ceil": (1, math.ceil),
    "abs": (1, abs),
    "min": (2, min),
    "max": (2, max),
}
NAMED = {"pi": math.pi}


class ConstantError(Exception):
    """A constant expression has no value; carries what the diagnostic says.

    ``waits``: it would have one if a checkpoint's config.json were given.
    """

    def __init__(self, code: str, message: str, span: Span, hint: str = "", waits: bool = False):
        super().__init__(message)
        self.code, self.message, self.span, self.hint = code, message, span, hint
        self.waits = waits

    def report(self, found: Diagnostics) -> None:
        found.error(self.code, self.message, self.span, hint=self.hint)


Lookup = Callable[[str, Span], Constant]
SizeOf = Callable[[str, Span], Constant]


def evaluate(
    expr: ast.Expr, lookup: Lookup, size: SizeOf, functions: Mapping[str, ast.ConstFn] = {}
) -> Constant:
    """The value of a constant expression.

    Raises:
        ConstantError: unknown names, arithmetic that has no result, values of the wrong kind.
    """
    try:
        return _Evaluation(lookup, size, functions).value(expr)
    except RecursionError:
        raise ConstantError("E0103", "this is nested too deeply", expr.span) from None


@dataclass
class _Evaluation:
    lookup: Lookup
    size: SizeOf
    functions: Mapping[str, ast.ConstFn]
    outer: _Evaluation | None = None  # of the const function's caller
    calls: int = 0

    def value(self, expr: ast.Expr) -> Constant:
        go = self.value
        match expr:
            case ast.Literal(value=value):
                return value
            case ast.Ref(name=name, member=None, subscripts=None):
                return self.lookup(name.text, name.span)
            case ast.Group() if expr.inner is not None:
                return go(expr.inner)
            case ast.Choose(condition=condition, then=then, otherwise=otherwise):
                return go(then) if go(condition) else go(otherwise)
            case ast.Unary(op="not", operand=operand):
                return not go(operand)
            case ast.Unary(operand=operand):
                return -_number(go(operand), operand.span)
            case ast.Binary(op="and", left=left, right=right):
                return bool(go(left)) and bool(go(right))
            case ast.Binary(op="or", left=left, right=right):
                return bool(go(left)) or bool(go(right))
            case ast.Binary(op=op, left=left, right=right):
                return _binary(op, go(left), go(right), left.span, right.span, expr.span)
            case ast.Call(name=name, member=None, subscripts=None, arguments=arguments):
                return self._call(expr, name, arguments)
        raise ConstantError("E0301", "this has no value when the model is compiled", expr.span)

    def _call(self, e: ast.Expr, name: ast.Name, arguments: tuple[ast.Expr, ...]) -> Constant:
        match name.text, arguments:
            case "size", (ast.Ref(name=index, member=None, subscripts=None),):
                return self.size(index.text, index.span)
        values = [self.value(a) for a in arguments]
        if name.text in self.functions:
            return self._function(self.functions[name.text], values, e.span)
        arity, fn = FUNCTIONS.get(name.text, (-1, None))
        if fn is None or len(values) != arity:  # reported where the file is checked
            raise ConstantError("E0501", f"'{name.text}' cannot be called like this", e.span)
        numbers = [_number(v, a.span) for v, a in zip(values, arguments, strict=True)]
        return _arithmetic(fn, numbers, e.span)

    def _function(self, fn: ast.ConstFn, values: list[Constant], span: Span) -> Constant:
        if len(values) != len(fn.formals):
            raise ConstantError("E0501", f"'{fn.name.text}' cannot be called like this", span)
        outermost = self
        while outermost.outer is not None:
            outermost = outermost.outer
        outermost.calls += 1
        if outermost.calls > MOST_CALLS:
            raise ConstantError("E0302", f"'{fn.name.text}' calls itself without end", fn.name.span)
        own = {f.text: v for f, v in zip(fn.formals, values, strict=True)}

        def look(name: str, span: Span) -> Constant:
            return own[name] if name in own else self.lookup(name, span)

        return _Evaluation(look, self.size, self.functions, self).value(fn.value)


def _number(value: Constant, span: Span) -> int | float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    raise ConstantError("E0303", f"this is {shown(value)}, not a number", span)


def _binary(
    op: str, left: Constant, right: Constant, at: Span, other: Span, span: Span
) -> Constant:
    if op == "==":
        return left == right
    if op == "!=":
        return left != right
    a, b = _number(left, at), _number(right, other)
    match op:
        case "+":
            return _arithmetic(lambda: a + b, [], span)
        case "-":
            return _arithmetic(lambda: a - b, [], span)
        case "*":
            return _arithmetic(lambda: a * b, [], span)
        case "/":
            if isinstance(a, int) and isinstance(b, int) and b and a % b == 0:
                return a // b
            return _arithmetic(lambda: a / b, [], span)
        case "^":
            if isinstance(a, int) and isinstance(b, int) and b >= 0:
                if b > 64 and abs(a) > 1:
                    raise ConstantError("E0303", f"{a}^{b} is too large", span)
                return _arithmetic(lambda: a**b, [], span)
            return _arithmetic(lambda: math.pow(a, b), [], span)
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[op]


def _arithmetic(fn: Callable[..., Any], values: list[Any], span: Span) -> Constant:
    try:
        result: Constant = fn(*values)
    except ZeroDivisionError:
        raise ConstantError("E0303", "this divides by zero", span) from None
    except (ValueError, OverflowError):
        raise ConstantError("E0303", "this has no finite value", span) from None
    if isinstance(result, int) and abs(result) > LARGEST:
        raise ConstantError("E0303", "this number is too large", span)
    return result


def polynomial(
    expr: ast.Expr, name: Callable[[str, Span], Extent], size: Callable[[str, Span], Extent]
) -> Extent:
    """An extent from an expression of constants, ``+ - * /`` and ``size(index)``.

    Raises:
        ConstantError: anything else stands in it.
    """

    try:
        return _polynomial(expr, name, size)
    except RecursionError:
        raise ConstantError("E0103", "this is nested too deeply", expr.span) from None


def _polynomial(
    expr: ast.Expr, name: Callable[[str, Span], Extent], size: Callable[[str, Span], Extent]
) -> Extent:
    def go(e: ast.Expr) -> Extent:
        return _polynomial(e, name, size)

    try:
        match expr:
            case ast.Literal(value=int(value)) if not isinstance(value, bool):
                return Extent.of(value)
            case ast.Literal(value=float(value)):
                raise ConstantError("E0304", f"{value:g} is not a whole number", expr.span)
            case ast.Ref(name=ref, member=None, subscripts=None):
                return name(ref.text, ref.span)
            case ast.Group() if expr.inner is not None:
                return go(expr.inner)
            case ast.Unary(op="-", operand=operand):
                return -go(operand)
            case ast.Binary(op="+", left=left, right=right):
                return go(left) + go(right)
            case ast.Binary(op="-", left=left, right=right):
                return go(left) - go(right)
            case ast.Binary(op="*", left=left, right=right):
                return go(left) * go(right)
            case ast.Binary(op="/", left=left, right=right):
                return go(left) / go(right)
            case ast.Call(
                name=ast.Name(text="size"), arguments=(ast.Ref(name=index, subscripts=None),)
            ):
                return size(index.text, index.span)
    except ExtentError as error:
        raise ConstantError("E0304", str(error), expr.span) from None
    raise ConstantError(
        "E0304",
        "an extent is made of whole numbers, constants, + - * / and size(index)",
        expr.span,
        "give the value a name: const n = ...",
    )


# -- the constants of a program --------------------------------------------------------------------


@dataclass
class Choices:
    """What the user chose: ``--set``, the checkpoint's config.json, ``--dims``."""

    set: Mapping[str, Constant] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    preset: str | None = None


class Constants:
    """The values of all constants of a program, each computed when it is first asked for."""

    def __init__(
        self,
        declared: Mapping[str, ast.ConstDecl],
        functions: Mapping[str, ast.ConstFn],
        presets: Mapping[str, ast.Dims],
        choices: Choices,
        found: Diagnostics,
    ):
        self.declared = declared
        self.functions = functions
        self.presets = presets
        self.choices = choices
        self.settings = self._settings(presets, found)
        self.set = self._chosen(found)
        self._values: dict[str, Constant] = {}
        self._failed: dict[str, ConstantError] = {}
        self._open: list[str] = []

    def _settings(
        self, presets: Mapping[str, ast.Dims], found: Diagnostics
    ) -> dict[str, ast.Setting]:
        """The chosen preset over the ones it changes."""
        chosen = presets.get(self.choices.preset) if self.choices.preset else None
        if chosen is None and self.choices.config is None:
            chosen = next((p for p in presets.values() if p.default), None)
        chain: list[ast.Dims] = []
        while chosen is not None and chosen not in chain:
            chain.append(chosen)
            chosen = presets.get(chosen.base.text) if chosen.base else None
        out: dict[str, ast.Setting] = {}
        for preset in reversed(chain):
            out |= {s.name.text: s for s in preset.settings if s.name.text in self.declared}
        return out

    def _chosen(self, found: Diagnostics) -> dict[str, Constant]:
        """``--set`` by constant name or by any of its config keys."""
        out: dict[str, Constant] = {}
        for given, value in self.choices.set.items():
            names = [given] if given in self.declared else self._reading(given)
            if not names:
                keys = dict.fromkeys(k for decl in self.declared.values() for k in decl.keys)
                hint = near(given, [*self.declared, *keys])
                found.error(
                    "E0306",
                    f"--set {given}: no constant or config key has this name",
                    None,
                    hint=hint,
                )
            else:
                out |= dict.fromkeys(names, value)
        return out

    def _reading(self, key: str) -> list[str]:
        """The constants that would take their value from this key, were it in config.json."""
        config = self.choices.config or {}
        return [
            name
            for name, decl in self.declared.items()
            if key in decl.keys
            and all(config_value(config, k) is None for k in decl.keys[: decl.keys.index(key)])
        ]

    def overruled(self) -> list[str]:
        """Constants of the chosen preset to which config.json gives another value."""
        if self.choices.config is None:
            return []
        out = []
        for name, setting in self.settings.items():
            known = any(
                config_value(self.choices.config, k) is not None for k in self.declared[name].keys
            )
            if (
                known
                and name not in self.set
                and self.value(name, setting.span) != self._evaluate(setting.value)
            ):
                out.append(name)
        return out

    def __contains__(self, name: object) -> bool:
        return name in self.declared

    def value(self, name: str, span: Span) -> Constant:
        """The constant's value.

        Raises:
            ConstantError: it has none, or depends on itself.
        """
        if name in NAMED and name not in self.declared:
            return NAMED[name]
        if name not in self.declared:
            raise ConstantError(
                "E0204",
                f"no constant is called '{name}'",
                span,
                near(name, [*self.declared, *NAMED]),
            )
        if name not in self._values:
            if name in self._open:
                circle = self._open[self._open.index(name) :]
                first = next(n for n in self.declared if n in circle)  # told alike from all of them
                turned = [*circle[circle.index(first) :], *circle[: circle.index(first)], first]
                raise ConstantError(
                    "E0302",
                    f"'{first}' depends on itself: {' -> '.join(turned)}",
                    self.declared[first].name.span,
                )
            if name in self._failed:
                raise self._failed[name]
            self._open.append(name)
            try:
                self._values[name] = self._compute(name, span)
            except ConstantError as error:
                self._failed[name] = error
                raise
            finally:
                self._open.pop()
        return self._values[name]

    def _compute(self, name: str, span: Span) -> Constant:
        decl = self.declared[name]
        if name in self.set:
            return self.set[name]
        if self.choices.config is not None:
            for key in decl.keys:
                value = config_value(self.choices.config, key)
                if value is not None:
                    return _checked(value, key, decl)
            for key in decl.keys:
                if section := not_a_section(self.choices.config, key):
                    raise ConstantError(
                        "E0307",
                        f"config.json: {section} is no section, and '{name}' is read from {key}",
                        decl.name.span,
                    )
        if name in self.settings:
            return self._evaluate(self.settings[name].value)
        if decl.value is not None:
            return self._evaluate(decl.value)
        if self.choices.config is not None:
            keys = " or ".join(decl.keys)
            raise ConstantError(
                "E0301",
                f"config.json has no {keys}, which '{name}' needs",
                decl.name.span,
                f"--set {name}=... gives it a value",
            )
        raise ConstantError(
            "E0301",
            f"'{name}' has no value",
            decl.name.span,
            f"give it with --set {name}=..., with a preset, or with a checkpoint "
            f"whose config.json has {decl.keys[0]}",
            waits=True,
        )

    def _evaluate(self, expr: ast.Expr) -> Constant:
        return evaluate(expr, self.value, no_size, self.functions)


def _checked(value: Any, key: str, decl: ast.ConstDecl) -> Constant:
    """A value of config.json that a constant can have."""
    what = ""
    if isinstance(value, (list, dict)):
        what = "a list" if isinstance(value, list) else "a section"
    elif isinstance(value, float) and not math.isfinite(value):
        what = str(value)
    elif isinstance(value, int) and abs(value) > LARGEST:
        what = "too large a number"
    if what:
        raise ConstantError(
            "E0307",
            f"config.json: {key} is {what}, not a number, text or truth value",
            decl.name.span,
        )
    return value


def no_size(name: str, span: Span) -> Constant:
    raise ConstantError("E0206", f"no index '{name}' is known here", span)


def shown(value: Any) -> str:
    """A constant as it is written."""
    if isinstance(value, str):
        return f'"{value}"'
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
