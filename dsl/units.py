"""Units of figures: what a device or a network can do, and what a deployment asks for.

Prefixes are decimal (``80 GB`` is 80e9 bytes); ``GiB`` and its like are binary. A lower-case ``b``
is a bit: a ``400 Gb/s`` port carries 50e9 bytes per second.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsl.deploy import syntax as ast
from dsl.diagnostics import Diagnostics, near

_DECIMAL = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}

# What is measured -> unit -> its size in the base unit, which is the first of each.
UNITS: dict[str, dict[str, float]] = {
    "compute": {f"{p}FLOPS": size for p, size in _DECIMAL.items()}
    | {f"{p}FLOP/s": size for p, size in _DECIMAL.items()},
    "bandwidth": {f"{p}B/s": size for p, size in (_DECIMAL | _BINARY).items()}
    | {f"{p}b/s": size / 8 for p, size in _DECIMAL.items()},
    "memory": {f"{p}B": size for p, size in (_DECIMAL | _BINARY).items()},
    "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "power": {"W": 1.0, "kW": 1e3},
    "price": {"USD/h": 1.0},
    "fraction": {"%": 0.01},
}
_MEASURES = {unit: (what, size) for what, units in UNITS.items() for unit, size in units.items()}
_NAMES = {
    "compute": "a rate of operations",
    "bandwidth": "a bandwidth",
    "memory": "an amount of memory",
    "time": "a time",
    "power": "a power",
    "price": "a price",
    "fraction": "a share",
}
_EXAMPLES = {
    "compute": "989 TFLOPS",
    "bandwidth": "3.35 TB/s",
    "memory": "80 GB",
    "time": "2 us",
    "power": "700 W",
    "price": "2 USD/h",
    "fraction": "85%",
}


@dataclass(frozen=True)
class Measure:
    """A quantity. ``value`` is in the base unit of what it measures: FLOP/s, bytes per second,
    bytes, seconds, watts, dollars per hour, a fraction of one."""

    value: float
    what: str
    text: str

    def __str__(self) -> str:
        return self.text


def measure(
    quantity: ast.Quantity, wanted: tuple[str, ...], name: str, found: Diagnostics
) -> Measure | None:
    """A written quantity, which must measure one of ``wanted``; None after a diagnostic."""
    text, unit = quantity.span.text, quantity.unit
    if unit not in _MEASURES:
        allowed = [u for what in wanted for u in UNITS[what]]
        hint = near(unit, allowed) or example(wanted)
        found.error("E0801", f"'{unit}' is no unit", quantity.span, hint=hint)
        return None
    what, size = _MEASURES[unit]
    if what not in wanted:
        found.error(
            "E0801",
            f"'{name}' is {' or '.join(_NAMES[w] for w in wanted)}, and '{unit}' measures"
            f" {_NAMES[what]}",
            quantity.span,
            hint=example(wanted),
        )
        return None
    return Measure(quantity.number * size, what, " ".join(text.split()))


def example(wanted: tuple[str, ...]) -> str:
    """``write it as 989 TFLOPS or 85%``."""
    return "write it like " + " or ".join(_EXAMPLES[what] for what in wanted)
