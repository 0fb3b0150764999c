"""Checks expressions that the constants decide: their names, before any value is known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from dsl import syntax as ast
from dsl.constants import FUNCTIONS, NAMED
from dsl.diagnostics import Diagnostics, Span, near
from dsl.files import exporter


@dataclass
class Readable:
    """What a compile-time expression may name in one place.

    Attributes:
        constants: names of constants and settings.
        functions: const functions.
        size: reports an index that has no extent here, and says whether it has one; None where no
            ``size(...)`` may stand, and ``place`` then says where that is.
        values: names without a value when the model is compiled, and where they are declared.
        instead: the hint for these.
        later: where a name is declared further down.
        broken: was this name declared where the file does not parse?
    """

    found: Diagnostics
    constants: Collection[str]
    functions: Mapping[str, ast.ConstFn]
    broken: Callable[[str], bool]
    size: Callable[[ast.Name], bool] | None = None
    place: str = "here"
    values: Mapping[str, Span | None] = field(default_factory=dict)
    instead: str = ""
    later: Callable[[str], Span | None] = lambda name: None

    def check(self, e: ast.Expr) -> bool:
        """Report what ``e`` may not read; True if there is nothing."""
        match e:
            case ast.Literal():
                return True
            case ast.Ref(name=name, member=None, subscripts=None):
                return self._name(name)
            case ast.Call(name=name, member=None, subscripts=None, arguments=arguments):
                return self._call(e, name, arguments)
            case ast.Group() if e.inner is not None:
                return self.check(e.inner)
            case ast.Unary(operand=operand):
                return self.check(operand)
            case ast.Binary(left=left, right=right):
                return self._all((left, right))
            case ast.Choose(condition=condition, then=then, otherwise=otherwise):
                return self._all((condition, then, otherwise))
        if isinstance(e, (ast.Ref, ast.Call)) and self.broken(e.name.text):
            return False
        self.found.error("E0301", "this has no value when the model is compiled", e.span)
        return False

    def _all(self, exprs: tuple[ast.Expr, ...]) -> bool:
        looked_at = [self.check(e) for e in exprs]
        return all(looked_at)

    def _name(self, name: ast.Name) -> bool:
        text = name.text
        if text in self.constants or text in NAMED:
            return True
        if text in self.values:
            self.found.error(
                "E0301",
                f"'{text}' has no value when the model is compiled",
                name.span,
                notes=[(self.values[text], "declared here")],
                hint=self.instead,
            )
        elif self.broken(text):
            return False
        elif self.later(text) is not None:
            self.found.error(
                "E0504",
                f"'{text}' is used before it is declared",
                name.span,
                notes=[(self.later(text), "declared here")],
            )
        else:
            self.found.error(
                "E0204",
                f"no constant is called '{text}'",
                name.span,
                hint=near(text, [*self.constants, *NAMED]) or exporter(text, "const"),
            )
        return False

    def _call(self, e: ast.Expr, name: ast.Name, arguments: tuple[ast.Expr, ...]) -> bool:
        text = name.text
        if text == "size":
            return self._size(e, arguments)
        fine = self._all(arguments)
        if text in self.functions:
            formals = self.functions[text].formals
            wanted, declared = len(formals), self.functions[text].name.span
        elif text in FUNCTIONS:
            wanted, declared = FUNCTIONS[text][0], None
        else:
            if not self.broken(text):
                known = [*self.functions, *FUNCTIONS, "size"]
                self.found.error(
                    "E0207",
                    f"no function of constants is called '{text}'",
                    name.span,
                    hint=near(text, known),
                )
            return False
        if len(arguments) != wanted:
            self.found.error(
                "E0501",
                f"'{text}' takes {wanted} argument{'s' * (wanted != 1)}, not {len(arguments)}",
                e.span,
                notes=[(declared, "declared here")],
            )
            return False
        return fine

    def _size(self, e: ast.Expr, arguments: tuple[ast.Expr, ...]) -> bool:
        match arguments:
            case (ast.Ref(name=index, member=None, subscripts=None),):
                if self.size is not None:
                    return self.size(index)
                self.found.error("E0301", f"no index has an extent {self.place}", e.span)
                return False
        self.found.error("E0501", "size() takes the name of one index", e.span, hint="size(d)")
        return False
