"""Any named value of the source, with a loaded model's weights."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backends.pytorch.inputs import InputError
from backends.pytorch.runtime.fp8 import wide
from compiler.interpret import Interpreter
from compiler.text import parse

if TYPE_CHECKING:
    from backends.pytorch.model import Model


def trace(
    model: Model, source: str, entry: str, names: Sequence[str], tokens: Tensor
) -> dict[str, Tensor]:
    """Run the reference interpreter sequence by sequence, and keep what is asked for.

    Args:
        source: the text of the graph that has every named value: before passes rewrite it.
        tokens: int64 [batch, time].

    Returns:
        By name [batch, ...], the dims in the order of the source.

    Raises:
        InputError: the source names no such value.
    """
    program = parse(source)
    weights = {}
    for row in model.manifest.parameters:
        for tensor in row.pattern().tensors():
            weight = model.weight(tensor.path)
            if weight is not None:
                weights[tensor.path] = wide(weight.detach(), weight.dtype).cpu()
    interpreter = Interpreter(program, weights, act=model.dtype, coded=True)
    argument = program.entries[entry].inputs[0].name
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        for sequence in tokens.cpu():
            values: dict[str, Tensor] = {}
            interpreter.run(entry, {argument: sequence}, trace=values)
            for name in names:
                if name not in values:
                    near = difflib.get_close_matches(name, values, n=1)
                    hint = f"; did you mean '{near[0]}'?" if near else ""
                    raise InputError(f"'{entry}' computes no value named '{name}'{hint}")
                found[name].append(values[name])
    return {name: torch.stack(values) for name, values in found.items()}
