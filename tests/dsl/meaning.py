"""What the checker makes of an equation, as text with every sum written out.

meaning("y[f] = W[f,d] * x[d]", "x[d]")  ->  "sum[d](W[f,d] * x[d])"
"""

from __future__ import annotations

from pathlib import Path

from dsl import syntax as ast
from dsl import typed
from dsl.check import ProgramChecker
from dsl.diagnostics import Diagnostics
from dsl.files import load
from dsl.variants import variants

# Names that equations of the tests may use without declaring them.
AROUND = """
const hidden = 8
const heads = 4
const experts = 8
const groups = 2
index t : time, s : history t
index d : hidden, f : 16, h : heads, n : 4, v : 4, j : 2, o : 2
index g : groups, m : experts / groups, e = (g, m), k : 2
"""
STORED = """
  param W[f, d]
  param U[d, f]
  param Q[(h, n|j), d]
  param O[d, (h, v)]
  param C[e, d]
  param gain[d]
  param bias[f]
  state load[e]
"""


def checked(path: Path, text: str) -> tuple[ProgramChecker, Diagnostics]:
    """A text's checker, before anything has been checked."""
    path.write_text(text, encoding="utf-8")
    found = Diagnostics()
    return ProgramChecker(load(path, found), found), found


def blocks(path: Path, text: str, name: str = "B") -> list[typed.Block]:
    """A block under each way its conditions can turn out."""
    checker, found = checked(path, text)
    for unit in checker.library.units:
        for decl in unit.file.declarations:
            if isinstance(decl, ast.Block) and decl.name.text == name:
                out = [checker.block(decl, unit, way) for way in variants(decl.members)]
                found.raise_if_any()
                return out
    raise AssertionError(f"no block {name}")


def meaning(path: Path, equation: str, inputs: str = "x[t,d]") -> str:
    """The right side of the last line of ``equation``, whose left side is the result."""
    result = equation.strip().split("\n")[-1].split("=")[0].strip()
    text = (
        f"{AROUND}\nblock B {{\n{STORED}\n  def ({inputs}) -> {result} {{\n{equation}\n  }}\n}}\n"
    )
    (block,) = blocks(path, text)
    return written(block.defs["call"].equations[-1].value)


def written(e: typed.Expr) -> str:
    """An expression with what it sums."""
    match e:
        case typed.Contraction(factors=factors, over=over):
            return _over("sum", over, " * ".join(map(_factor, factors)))
        case typed.Reduce(fn=fn, over=over, arg=arg):
            return _over(fn, over, written(arg))
        case typed.Choice(fn=fn, over=over, to=to, arg=arg):
            return f"{fn}[{over}{f' -> {to}' if to else ''}]({written(arg)})"
        case typed.Map(fn=fn, args=args):
            return f"{fn}({', '.join(map(written, args))})"
        case typed.Broadcast(axes=axes, arg=arg):
            return _over("broadcast", axes, written(arg))
        case typed.Join(fn=fn, axis=axis, args=args):
            return f"{fn}[{axis}]({', '.join(map(written, args))})"
        case typed.Value(name=name, subscripts=subs):
            return f"{name}[{', '.join(map(_subscript, subs))}]" if subs else name
        case typed.CallFn(fn=name, args=args):
            return f"{name}({', '.join(map(written, args))})"
        case typed.CallBlock(use=use, pick=pick, args=args):
            return f"{use}{f'[{written(pick)}]' if pick else ''}({', '.join(map(written, args))})"
        case typed.Position(index=index):
            return f"position[{index}]"
        case typed.Iota(index=index):
            return str(index)
        case typed.Scalar():
            return e.span.text
    raise AssertionError(e)


def _factor(factor: typed.Factor) -> str:
    value = written(factor.value)
    if not factor.divides:
        return value
    product = isinstance(factor.value, typed.Contraction) and not factor.value.over
    return f"1 / ({value})" if product else f"1 / {value}"


def _over(fn: str, axes: tuple[typed.Axis, ...], inside: str) -> str:
    return f"{fn}[{', '.join(map(str, axes))}]({inside})" if axes else inside


def _subscript(sub: typed.Sub) -> str:
    match sub:
        case typed.Take(axis=axis):
            return str(axis)
        case typed.Part(part=part, inner=inner):
            return f"{part} at {_subscript(inner)}" if str(part) != _subscript(inner) else str(part)
        case typed.Split(inner=inner):
            return f"({', '.join(map(_subscript, inner))})"
        case typed.Pick(value=value):
            return written(value)
        case typed.At(value=value):
            return value.span.text
    raise AssertionError(sub)
