"""The text of a power: a logarithm takes no number below zero, which may have a whole power."""

from __future__ import annotations

MOST_FACTORS = 8  # of a power that is multiplied out


def power(base: str, exponent: str) -> str | None:
    """``base ^ exponent`` of names and literals; None if there is no text for all numbers."""
    fixed, number = _literal(exponent), _literal(base)
    whole = fixed is not None and fixed.is_integer()
    if fixed is not None and whole and 0 < abs(fixed) <= MOST_FACTORS:
        product = " * ".join([base] * int(abs(fixed)))
        return product if fixed > 0 else f"1.0 / ({product})"
    if (number is not None and number > 0) or (fixed is not None and not whole):
        return f"tl.exp2({exponent} * tl.log2({base}))"
    return None


def _literal(text: str) -> float | None:
    try:
        return float(text.removeprefix('float("').removesuffix('")'))
    except ValueError:
        return None
