"""``decode.json``: which compiled pieces make up a decode step, and what each is given."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeInt

FILE_NAME = "decode.json"


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
    weights: tuple[str, ...]  # attribute paths in the model; of an array, with * for its number
    results: tuple[NonNegativeInt, ...]


class Plan(_Row):
    """A decode step of one token of one sequence, for the entry ``main``."""

    dtype: str  # of weights and activations
    torch: str  # the version that compiled it, whose packages others need not read
    machine: str  # platform.machine()
    features: tuple[str, ...]  # of the CPU, that the code may use
    calls: tuple[Call, ...]
    logits: NonNegativeInt  # the value that is the result [1, vocab]

    def arrays(self) -> dict[str, frozenset[str]]:
        """What is stacked: by the array's path, the attribute paths in each of its blocks."""
        found: dict[str, set[str]] = {}
        for call in self.calls:
            for path in call.weights:
                array, star, rest = path.partition(".*.")
                if star:
                    found.setdefault(array, set()).add(rest)
        return {array: frozenset(rest) for array, rest in found.items()}
