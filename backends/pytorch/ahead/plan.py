"""``decode.json``: which compiled pieces make up a decode step, and what each is given."""

from __future__ import annotations

from functools import cached_property

from pydantic import BaseModel, ConfigDict, NonNegativeInt

FILE_NAME = "decode.json"
SCALE = "#scale"


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Call(_Row):
    """One call of a piece: it is given values, caches and weights, in this order.

    Values are numbered: 0 is the token (int64 [1]), 1 its place in the history (int64 [1]), and
    each result has the next number.
    """

    piece: str  # the file of the package
    values: tuple[NonNegativeInt, ...]
    caches: tuple[str, ...]  # paths in the cache; views [history, ...] are given, and written to
    # Attribute paths in the model; of an array, with * for its number; with #scale behind it, the
    # scales of a weight whose bytes stand under the path.
    weights: tuple[str, ...]
    results: tuple[NonNegativeInt, ...]


class Plan(_Row):
    """A decode step of one token of one sequence, for the entry ``main``."""

    dtype: str  # of weights and activations
    torch: str  # the version that compiled it, whose packages others need not read
    machine: str  # platform.machine()
    features: tuple[str, ...]  # of the CPU, that the code may use
    block: tuple[int, int] | None = None  # rows and columns with one scale, where there are such
    widen: str | None = None  # the package that widens a weight with scales
    few_rows: str | None = None  # the package for products of a few rows: rows.few_rows
    few_rows_of_blocks: str | None = None  # and with such weights
    calls: tuple[Call, ...]
    logits: NonNegativeInt  # the value that is the result [1, vocab]

    @cached_property
    def packages(self) -> frozenset[str]:
        """The names of all compiled files."""
        others = (self.widen, self.few_rows, self.few_rows_of_blocks)
        return frozenset({*(call.piece for call in self.calls), *(o for o in others if o)})

    @cached_property
    def blocked(self) -> frozenset[str]:
        """The attribute paths of weights that are kept as bytes and scales."""
        return frozenset(
            path.removesuffix(SCALE)
            for call in self.calls
            for path in call.weights
            if path.endswith(SCALE)
        )

    @cached_property
    def arrays(self) -> dict[str, frozenset[str]]:
        """What is stacked: by the array's path, the attribute paths in each of its blocks."""
        found: dict[str, set[str]] = {}
        for call in self.calls:
            for path in call.weights:
                array, star, rest = path.partition(".*.")
                if star and not rest.endswith(SCALE):
                    found.setdefault(array, set()).add(rest)
        return {array: frozenset(rest) for array, rest in found.items()}

    def place(self, path: str) -> tuple[str, str | None, str]:
        """The path of a stack with ``*`` for the number, the array's path, and the number; the path
        itself and no array for what is in no stack."""
        parts = path.split(".")
        for at, part in enumerate(parts):
            array, rest = ".".join(parts[:at]), ".".join(parts[at + 1 :])
            if part.isdigit() and rest in self.arrays.get(array, ()):
                return f"{array}.*.{rest}", array, part
        return path, None, ""
