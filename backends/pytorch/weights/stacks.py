"""Tensors that a checkpoint keeps stacked: one tensor for all blocks of an array.

Where a name has a number in square brackets, ``experts[3].gate_up_proj``, that number is no part of
the stored tensor's name but a place along its first axis: row 3 of ``experts.gate_up_proj``. Rows
lie one after another, so each is read as any tensor is, and nothing else of the stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from backends.pytorch.weights.tensorfile import Stored
from compiler.tensors import Pattern, Tensor

PLACE = re.compile(r"\[(\d+)\]")

Places = tuple[int, ...]


def stacked(name: str) -> tuple[str, Places]:
    """The stored tensor's name, and the places along its first axes; none if it is not stacked."""
    return PLACE.sub("", name), tuple(int(n) for n in PLACE.findall(name))


def find(tensors: Mapping[str, Stored], name: str) -> Stored | None:
    """A tensor by its name in the model; None if the checkpoint has none, or not so many rows."""
    if name in tensors:
        return tensors[name]
    base, places = stacked(name)
    stack = tensors.get(base)
    if stack is None or not places:
        return None
    lead = stack.shape[: len(places)]
    if len(lead) < len(places) or any(p >= n for p, n in zip(places, lead, strict=True)):
        return None
    row = 0
    for place, size in zip(places, lead, strict=True):
        row = row * size + place
    size = stack.size // prod(lead)
    shape = stack.shape[len(places) :]
    return replace(stack, name=name, shape=shape, start=stack.start + row * size, size=size)


@dataclass
class Stacks:
    """The stacks that a model reads: how many rows of each, along each axis."""

    lead: dict[str, Places] = field(default_factory=dict)

    @classmethod
    def of(cls, patterns: Iterable[Pattern]) -> Stacks:
        made = cls()
        for pattern in patterns:
            if "[" in pattern.name:
                for tensor in pattern.tensors():
                    made._reach(*stacked(tensor.name))
        return made

    def _reach(self, base: str, places: Places) -> None:
        before = self.lead.get(base, ())
        within = (*before, *(0 for _ in places[len(before) :]))
        self.lead[base] = tuple(
            max(size, place + 1) for size, place in zip(within, places, strict=False)
        )

    def whole(self, tensor: Tensor) -> Tensor:
        """The stack that a tensor is a row of, as a tensor; itself if it is none."""
        base = stacked(tensor.name)[0]
        if base not in self.lead:
            return tensor
        return replace(tensor, name=base, shape=(*self.lead[base], *tensor.shape))
