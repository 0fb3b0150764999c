"""Extents against exact fractions: the normal form is a polynomial's, whatever was written."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsl.extents import MOST_POWER, MOST_TERMS, Extent, ExtentError

NAMES = ("a", "b", "c")
VALUES = st.fixed_dictionaries({n: st.integers(1, 30) for n in NAMES})
# Far apart: small sums and differences of them are no small numbers.
PRIMES = (
    1_000_003,
    7_368_787,
    26_535_917,
    93_238_513,
    338_327_959,
    884_197_169,
    1_939_937_533,
)
LARGE = st.permutations(PRIMES).map(lambda p: dict(zip(NAMES, p, strict=False)))


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[Extent, str]:
    """An extent, and the Python expression that made it."""
    if depth == 0 or draw(st.booleans()):
        if draw(st.booleans()):
            name = draw(st.sampled_from(NAMES))
            return Extent.name(name), name
        number = draw(st.integers(0, 9))
        return Extent.of(number), f"Fraction({number})"
    left, a = draw(expressions(depth=depth - 1))
    right, b = draw(expressions(depth=depth - 1))
    operator = draw(st.sampled_from("+-*"))
    value = {"+": left.__add__, "-": left.__sub__, "*": left.__mul__}[operator](right)
    return value, f"({a} {operator} {b})"


def exactly(text: str, values: dict[str, int]) -> Fraction:
    return Fraction(eval(text, {"Fraction": Fraction}, {n: Fraction(v) for n, v in values.items()}))


@given(expressions(), VALUES)
def test_an_extent_is_worth_what_its_expression_is(
    made: tuple[Extent, str], values: dict[str, int]
) -> None:
    extent, text = made
    assert extent.at(values) == exactly(text, values)


@given(expressions(), expressions(), LARGE, LARGE)
def test_extents_are_equal_if_and_only_if_they_are_equal_everywhere(
    one: tuple[Extent, str], other: tuple[Extent, str], here: dict[str, int], there: dict[str, int]
) -> None:
    """Two polynomials of low degree that agree at two arbitrary large points are one."""
    same = all(exactly(one[1], v) == exactly(other[1], v) for v in (here, there))
    assert (one[0] == other[0]) == same
    assert one[0] != other[0] or hash(one[0]) == hash(other[0])


@given(expressions(), VALUES, st.integers(1, 9), st.sampled_from(NAMES))
def test_a_division_is_undone_by_a_product(
    made: tuple[Extent, str], values: dict[str, int], number: int, name: str
) -> None:
    extent, text = made
    assert extent / number * number == extent
    assert extent / Extent.name(name) * Extent.name(name) == extent
    quotient = exactly(text, values) / number
    if quotient.denominator == 1:
        assert (extent / number).at(values) == quotient
    else:
        with pytest.raises(ExtentError, match="not a whole number"):
            (extent / number).at(values)


@given(expressions(), expressions(), VALUES)
def test_substituting_is_computing_later(
    made: tuple[Extent, str], other: tuple[Extent, str], values: dict[str, int]
) -> None:
    inner = other[0].at(values)
    assert made[0].substitute({"a": other[0]}).at(values) == made[0].at({**values, "a": inner})


@given(expressions())
def test_the_text_of_an_extent_reads_back(made: tuple[Extent, str]) -> None:
    text = str(made[0]).replace("^", "**")
    values = {"a": 2, "b": 3, "c": 5}
    assert exactly(text, values) == made[0].at(values)


@pytest.mark.parametrize(
    ("extent", "text"),
    [
        (Extent.name("experts") / Extent.name("groups"), "experts / groups"),
        (Extent.name("experts") / Extent.name("groups") * Extent.name("groups"), "experts"),
        (Extent.name("layers") - Extent.name("dense"), "layers - dense"),
        (Extent.name("h") * (Extent.name("n") + Extent.name("j")), "h * j + h * n"),
        (Extent.name("a") * Extent.name("a") / 2 + 1, "a^2 / 2 + 1"),
        (Extent.of(3) - 3, "0"),
    ],
)
def test_an_extent_reads_as_one_would_write_it(extent: Extent, text: str) -> None:
    assert str(extent) == text


def test_what_has_no_value_says_so() -> None:
    a, b = Extent.name("a"), Extent.name("b")
    with pytest.raises(ExtentError, match="'a' has no value"):
        a.at({})
    with pytest.raises(ExtentError, match="division by zero"):
        a / 0
    with pytest.raises(ExtentError, match="division by b, which is 0"):
        (a / b).at({"a": 1, "b": 0})
    with pytest.raises(ExtentError, match="cannot divide by the sum"):
        a / (a + b)
    assert (a + b) / (a + b) == Extent.of(1)


def test_extents_are_bounded() -> None:
    """Beyond these bounds comparing would take long, and nobody means it."""
    a = Extent.name("a")
    with pytest.raises(ExtentError, match="too complicated"):
        power = a
        for _ in range(MOST_POWER + 1):
            power = power * a
    with pytest.raises(ExtentError, match="too complicated"):
        total = Extent.of(0)
        for n in range(MOST_TERMS + 1):
            total = total + Extent.name(f"x{n}")
    with pytest.raises(ExtentError, match="too large"):
        Extent.of(2**40) * 2**40
