"""Symbolic extents: how long an index is, as a polynomial in the names of constants.

Two indices may be joined, split or compared only where their extents are *proved* equal for every
value of the constants; that two numbers happen to agree (``nope = value = 128``) proves nothing.
The normal form is a sum of monomials with rational coefficients and integer powers, so that
``experts / groups * groups`` is ``experts``. It is a few dozen lines of our own because importing a
computer algebra system takes longer than checking a whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Union

Monomial = tuple[tuple[str, int], ...]  # ((name, power), ...), sorted by name, no zero powers
ExtentLike = Union["Extent", int]

MOST_TERMS = 64  # an extent of more terms, or of higher powers, is a slip and takes long to compare
MOST_POWER = 16
LARGEST = 2**62


class ExtentError(ArithmeticError):
    """An extent has no value: a division is not exact, a name is not bound, it is too large."""


@dataclass(frozen=True)
class Extent:
    """A polynomial: ``terms`` maps monomials to non-zero rational coefficients."""

    terms: tuple[tuple[Monomial, Fraction], ...]

    @staticmethod
    def of(value: ExtentLike) -> Extent:
        if isinstance(value, Extent):
            return value
        return Extent(((((), Fraction(value)),)) if value else ())

    @staticmethod
    def name(name: str) -> Extent:
        """The extent that is the constant or dynamic length called ``name``."""
        return Extent((((((name, 1),), Fraction(1))),))

    @staticmethod
    def _build(terms: dict[Monomial, Fraction]) -> Extent:
        kept = sorted((m, c) for m, c in terms.items() if c)
        if len(kept) > MOST_TERMS or any(abs(p) > MOST_POWER for m, _ in kept for _, p in m):
            raise ExtentError("this extent is too complicated")
        if any(abs(c.numerator) > LARGEST or c.denominator > LARGEST for _, c in kept):
            raise ExtentError("this extent is too large")
        return Extent(tuple(kept))

    def __add__(self, other: ExtentLike) -> Extent:
        terms = dict(self.terms)
        for monomial, coefficient in Extent.of(other).terms:
            terms[monomial] = terms.get(monomial, Fraction(0)) + coefficient
        return Extent._build(terms)

    __radd__ = __add__

    def __neg__(self) -> Extent:
        return Extent(tuple((m, -c) for m, c in self.terms))

    def __sub__(self, other: ExtentLike) -> Extent:
        return self + -Extent.of(other)

    def __rsub__(self, other: ExtentLike) -> Extent:
        return Extent.of(other) - self

    def __mul__(self, other: ExtentLike) -> Extent:
        terms: dict[Monomial, Fraction] = {}
        for left, a in self.terms:
            for right, b in Extent.of(other).terms:
                monomial = _times(left, right, 1)
                terms[monomial] = terms.get(monomial, Fraction(0)) + a * b
        return Extent._build(terms)

    __rmul__ = __mul__

    def __truediv__(self, other: ExtentLike) -> Extent:
        """The quotient, whose exactness is settled when numbers are known.

        Raises:
            ExtentError: the divisor is zero, or a sum that is not this very extent.
        """
        divisor = Extent.of(other)
        if not divisor.terms:
            raise ExtentError("division by zero")
        if len(divisor.terms) > 1:
            if divisor == self:
                return Extent.of(1)
            raise ExtentError(f"cannot divide by the sum {divisor}")
        ((monomial, coefficient),) = divisor.terms
        return Extent._build({_times(m, monomial, -1): c / coefficient for m, c in self.terms})

    def __rtruediv__(self, other: ExtentLike) -> Extent:
        return Extent.of(other) / self

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for monomial, _ in self.terms for name, _ in monomial)

    @property
    def constant(self) -> int | None:
        """The integer that this extent is without knowing any constant, or None."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and self.terms[0][0] == () and self.terms[0][1].denominator == 1:
            return int(self.terms[0][1])
        return None

    def substitute(self, values: Mapping[str, ExtentLike]) -> Extent:
        """This extent with some names replaced by other extents."""
        if not self.names & values.keys():
            return self
        result = Extent(())
        for monomial, coefficient in self.terms:
            term = Extent._build({(): coefficient})
            for name, power in monomial:
                base = Extent.of(values[name]) if name in values else Extent.name(name)
                for _ in range(abs(power)):
                    term = term * base if power > 0 else term / base
            result = result + term
        return result

    def at(self, values: Mapping[str, int]) -> int:
        """The number of this extent for given constants.

        Raises:
            ExtentError: a name has no value, or a division leaves a remainder.
        """
        total = Fraction(0)
        for monomial, coefficient in self.terms:
            term = coefficient  # at most 16 factors of 62 bits each
            for name, power in monomial:
                if name not in values:
                    raise ExtentError(f"'{name}' has no value")
                base = Fraction(int(values[name]))
                if power < 0 and not base:
                    raise ExtentError(f"division by {name}, which is 0")
                term *= base**power
            total += term
        if total.denominator != 1:
            raise ExtentError(f"{self} is {total}, not a whole number")
        return int(total)

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        out = ""
        # Highest degree first reads as one would write it.
        for monomial, coefficient in sorted(
            self.terms, key=lambda t: (-_degree(t[0]), t[1] < 0, t[0])
        ):
            text = _monomial_text(monomial, abs(coefficient))
            if not out:
                out = text if coefficient > 0 else f"-{text}"
            else:
                out += f" + {text}" if coefficient > 0 else f" - {text}"
        return out

    __repr__ = __str__


def _degree(monomial: Monomial) -> int:
    return sum(power for _, power in monomial)


def _times(left: Monomial, right: Monomial, sign: int) -> Monomial:
    powers = dict(left)
    for name, power in right:
        powers[name] = powers.get(name, 0) + sign * power
    return tuple(sorted((n, p) for n, p in powers.items() if p))


def _monomial_text(monomial: Monomial, coefficient: Fraction) -> str:
    above = [n if p == 1 else f"{n}^{p}" for n, p in monomial if p > 0]
    below = [n if p == -1 else f"{n}^{-p}" for n, p in monomial if p < 0]
    if coefficient.numerator != 1 or not above:
        above.insert(0, str(coefficient.numerator))
    if coefficient.denominator != 1:
        below.insert(0, str(coefficient.denominator))
    return " * ".join(above) + "".join(f" / {b}" for b in below)
