"""Runs a backward graph in the reference interpreter, and gives each gradient its parameter's path.

derived = differentiate.differentiate(program)
found = gradients(Interpreter(derived.program, weights), "main", {"token": tokens, "grad": grad})
found.parameters["layers[3].attn.W_q"]         # in the shape of the parameter
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.bundles import packed
from compiler.interpret import Interpreter, join, parameters
from compiler.ir import Type
from compiler.rules import Scope
from compiler.semantics import Named
from compiler.semantics_bundles import Bundle, Rounds


@dataclass(frozen=True)
class Gradients:
    """An entry's result, and the gradients of its float inputs and of every parameter: zeros where
    none reaches one, such as an expert that no row picked."""

    result: Tensor
    inputs: dict[str, Tensor]
    parameters: dict[str, Tensor]


def gradients(interpreter: Interpreter, entry: str, inputs: Mapping[str, Tensor]) -> Gradients:
    """Run ``ENTRY.gradients`` of a differentiated program on a whole sequence.

    Args:
        inputs: the entry's, and ``grad``: the gradient of its result.

    Raises:
        RunError: something is missing, or does not fit.
    """
    program = interpreter.program
    point = program.entries[f"{entry}.gradients"]
    found = interpreter.value(point.name, inputs)
    scope = Scope(program, program.root)
    bundle = program.bodies[point.body].result
    types = [n.type for n in packed(scope, bundle.type.bundle)]
    assert isinstance(found, Bundle)
    values = dict(zip(bundle.attrs["names"], zip(found.items, types, strict=True), strict=True))
    trained = {p: x for p, x in parameters(program, interpreter.sizes) if x.role == "param"}
    total = {
        path: torch.zeros(
            [d.size.at(interpreter.sizes) for d in parameter.type.dims], dtype=interpreter.compute
        )
        for path, parameter in trained.items()
    }
    if "" in values:
        value, type = values.pop("")
        for path, gradient in _walk(scope, "", value, type):
            total[path] = total[path] + gradient.to(trained[path].type.names)
    result, _ = values.pop("result")
    return Gradients(result.tensor, {k: v.tensor for k, (v, _) in values.items()}, total)


def _walk(scope: Scope, path: str, value: Named, type: Type) -> Iterator[tuple[str, Named]]:
    """Each gradient of a bundle with its parameter's path."""
    assert isinstance(value, Bundle)
    names = _names(scope, type.bundle)
    inner = packed(scope, type.bundle)
    for name, item, node in zip(names, value.items, inner, strict=True):
        if not isinstance(item, Bundle):
            yield join(path, name), item
        elif isinstance(item, Rounds):
            for number, one in item.numbered().items():
                here = join(path, f"{name}[{number}]") if name else path
                yield from _walk(scope, here, one, node.type)
        else:
            yield from _walk(scope, join(path, name) if name else path, item, node.type)


def _names(scope: Scope, bundle: str) -> tuple[str, ...]:
    body, _, name = bundle.rpartition(":")
    names: tuple[str, ...] = scope.body(body)[name].attrs["names"]
    return names
