"""Sizes in Python: an extent as an expression of constants, a dim as an attribute of its class."""

from __future__ import annotations

from collections.abc import Mapping

from backends.pytorch.emit.text import ATOM, PRODUCT, SUM, Text
from backends.pytorch.names import Scope
from compiler.ir import Dim
from dsl.extents import Extent, ExtentError


class Constants:
    """The program's constants that the model's text names, in capitals."""

    def __init__(self, values: Mapping[str, int | float | bool | str | None], scope: Scope):
        self.values = values
        self._names = {name: scope.take(name.upper()) for name in values}
        self._used: set[str] = set()

    @property
    def reserved(self) -> list[str]:
        return list(self._names.values())

    @property
    def lines(self) -> list[str]:
        """``HIDDEN = 7168``, in the order of the source."""
        return [
            f"{self._names[name]} = {value!r}"
            for name, value in self.values.items()
            if name in self._used
        ]

    def name(self, name: str) -> str:
        self._used.add(name)
        return self._names[name]

    def named(self, value: float) -> str | None:
        """The one constant of this value, if its value tells it apart."""
        found = [
            name
            for name, other in self.values.items()
            if type(other) is type(value) and other == value and other not in (0, 1, 2)
        ]
        return self.name(found[0]) if len(found) == 1 else None

    def extent(self, extent: Extent) -> Text:
        """An extent as an expression of the constants."""
        sizes = {k: v for k, v in self.values.items() if type(v) is int}
        number = extent.at(sizes)
        if extent.constant is not None or not extent.names <= sizes.keys():
            return Text(str(number))
        out: Text | None = None
        for monomial, coefficient in sorted(extent.terms, key=lambda t: t[1] < 0):
            above = [self.name(n) for n, power in monomial for _ in range(max(power, 0))]
            below = [self.name(n) for n, power in monomial for _ in range(max(-power, 0))]
            if abs(coefficient.numerator) != 1 or not above:
                above.insert(0, str(abs(coefficient.numerator)))
            if coefficient.denominator != 1:
                below.append(str(coefficient.denominator))
            if not _whole(Extent(((monomial, coefficient),)), sizes):
                return Text(str(number))  # exact only as a sum
            term = Text(" * ".join(above), ATOM if len(above) == 1 else PRODUCT)
            for divisor in below:
                term = Text(f"{term.within(PRODUCT)} // {divisor}", PRODUCT)
            if out is None:
                out = Text(f"-{term.atom}", SUM) if coefficient < 0 else term
            else:
                sign = "-" if coefficient < 0 else "+"
                out = Text(f"{out} {sign} {term.within(SUM + 1)}", SUM)
        return out or Text("0")


def _whole(extent: Extent, sizes: dict[str, int]) -> bool:
    try:
        extent.at(sizes)
    except ExtentError:
        return False
    return True


class Sizes:
    """The dims of one class, as its constructor's arguments and attributes."""

    def __init__(self, scope: Scope):
        self._scope = scope
        self.names: dict[tuple[str, Extent], str] = {}
        self.stored: set[str] = set()  # those that methods read

    def atom(self, dim: Dim) -> str:
        """The name of an atom's size in the constructor."""
        key = (dim.name, dim.size)
        if key not in self.names:
            self.names[key] = self._scope.take(dim.name)
        return self.names[key]

    def text(self, dim: Dim, stored: bool) -> Text:
        """A dim's size: of sums and products, that of their parts."""
        if dim.form == "sum":
            return Text(" + ".join(self.text(p, stored).within(SUM) for p in dim.parts), SUM)
        if dim.form == "product" and dim.parts:
            parts = [self.text(p, stored).within(PRODUCT) for p in dim.parts]
            return Text(" * ".join(parts), PRODUCT)
        number = dim.size.constant
        if number is not None:
            return Text(str(number))
        name = self.atom(dim)
        if stored:
            self.stored.add(name)
            return Text(f"self.{name}")
        return Text(name)

    def equal(self, name: str, extent: Extent, known: list[Dim]) -> str | None:
        """The own dim that has a child's size: of the same name, or else the first so long."""
        for dim in known:
            if dim.name == name and dim.size == extent:
                return self.atom(dim)
        for dim in known:
            if (dim.name, dim.size) in self.names and dim.size == extent:
                return self.atom(dim)
        return None


def atoms(dims: tuple[Dim, ...]) -> list[Dim]:
    """The atoms that some dims are made of."""
    out: list[Dim] = []
    for dim in dims:
        out += atoms(dim.parts) if dim.parts else [dim]
    return out
