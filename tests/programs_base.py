"""What a generated block has written so far, and choices among it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

HEAD = """\
edition 2026
import std.norm
import std.ffn
import std.rotary
index t : time, s : history t
const hidden = {hidden}
const vocab = 11
fn squash(x) -> y {{ y = x / (1 + abs(x)) }}
fn centred[i](x[i]) -> y[i] {{
  let m: f32 = mean[i](x[i])
  y[i] = x[i] - broadcast[i](m)
}}
fn inner[i](x[i], z[i]) -> y {{ y = x[i] * z[i] }}
block Two[d] {{
  index a : size(d)
  param A[a,d]  param B[d,a]  param c
  def (x[d]) -> y[d] {{
    u[a] = tanh(A[a,d] * x[d]) * c
    y[d] = B[d,a] * u[a]
  }}
}}
block Step[d] {{
  index a : size(d)
  param A[d,a]  param g[d]
  def (x[t,d], b[t,d]) -> y[t,d] {{
    z[t,a] = x[t,a] + b[t,a]
    cached past[s,d] = g[d] * x[t,d]
    let before[t,d] = max[s](where(position[s] < position[t], past[s,d], -1.0))
    y[t,d] = tanh(A[d,a] * z[t,a]) + before[t,d]
  }}
}}
"""

MASKS = (
    "position[s] <= position[t]",
    "position[s] < position[t]",
    "position[t] - position[s] < 3 and position[s] <= position[t]",
    "position[t] - position[s] >= 2",
    "position[s] >= position[t]",
    "position[s] > position[t] + 1",
    "position[t] - position[s] < 3 and position[s] - position[t] < 2",
    "not (position[s] > position[t])",
    "position[s] == position[t] or position[s] < 1",
    "2 * position[s] <= position[t]",
    "position[s] < 2 and position[t] >= 0",
    "position[t] != position[s]",
)
FEW = ("tanh({})", "sigmoid({})", "cos({})", "squash({})", "-{}", "0.5 * {}", "{} - 1", "{} / 3",
       "max({}, 0.0)", "min({}, 0.25)", "abs({})", "{} * 1", "floor({} * 2)", "exp(squash({}))",
       "where({} > 0, 1, 0)")  # fmt: skip
MOST = 600  # numbers of a value, where time and history count as four


@dataclass(frozen=True)
class Value:
    name: str
    axes: tuple[str, ...]
    exact: bool = True  # no steps in it: what is chosen by size is not decided by rounding

    def __str__(self) -> str:
        return self.at()

    def at(self, *axes: str) -> str:
        axes = axes or self.axes
        return f"{self.name}[{','.join(axes)}]" if axes else self.name

    def where(self, old: str, new: str) -> str:
        return self.at(*(new if a == old else a for a in self.axes))


class Written:
    """The members and equations of one block, and what values there are so far."""

    def __init__(self, draw: Callable[..., object], hidden: int):
        self.draw = draw
        self.sizes = {"t": 4, "s": 4, "d": hidden}
        self.indices: list[str] = []
        self.members: list[str] = []
        self.lines: list[str] = []
        self.values = [Value("x", ("t", "d"))]
        self.numbers: dict[str, int] = {}
        self.norms: dict[str, str] = {}

    # -- choices ---------------------------------------------------------------------------------

    def one(self, some: Sequence):  # type: ignore[no-untyped-def, type-arg]
        return self.draw(st.sampled_from(list(some)))

    def maybe(self) -> bool:
        return bool(self.draw(st.booleans()))

    def some(self, among, least: int = 0, most: int = 9):  # type: ignore[no-untyped-def]
        """A part of these, in any order."""
        order = list(self.draw(st.permutations(list(among))))  # type: ignore[call-overload]
        return order[: self.draw(st.integers(min(least, len(order)), min(most, len(order))))]  # type: ignore[misc]

    def name(self, stem: str) -> str:
        self.numbers[stem] = self.numbers.get(stem, 0) + 1
        return f"{stem}{self.numbers[stem]}"

    # -- indices, parameters, equations ----------------------------------------------------------

    def size(self, axis: str) -> int:
        if "|" in axis:
            return sum(self.size(part) for part in axis.split("|"))
        return self.sizes[axis]

    def new(self, size: int | None = None, text: str = "") -> str:
        name = self.name("i")
        self.sizes[name] = size or self.one((1, 2, 2, 3, 4, 5))
        self.indices.append(f"{name} : {text or self.sizes[name]}")
        return name

    def param(self, *axes: str, role: str = "param") -> str:
        name = self.name("W")
        written = f"[{','.join(axes)}]" if axes else ""
        self.members.append(f"{role} {name}{written}" + (": f32" if role == "state" else ""))
        return f"{name}{written}"

    def fits(self, axes: Sequence[str]) -> bool:
        total = 1
        for axis in axes:
            total *= self.size(axis)
        return total <= MOST and len(set(axes)) == len(axes)

    def let(self, axes: Sequence[str], text: str, exact: bool = True, plain: bool = False) -> Value:
        value = Value(self.name("v"), tuple(self.some(axes, 9)), exact)
        kind = "" if plain or self.one((0, 0, 1)) else "let "
        dtype = ": f32" if self.maybe() else ""
        self.lines.append(f"{kind}{value}{dtype} = {text}")
        self.values.append(value)
        return value

    def value(self, fits: Callable[[Value], bool] = lambda v: True) -> Value | None:
        found = [v for v in self.values if fits(v)]
        return self.one(found[::-1]) if found else None

    def plain(self, value: Value) -> list[str]:
        return [a for a in value.axes if a not in ("t", "s")]
