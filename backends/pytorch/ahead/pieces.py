"""Cutting a decode step into pieces: one for each kind of layer, and what lies between layers.

The entry is traced with each block of an array (a layer) as one opaque operation. The trace falls
into segments before, between and behind the layers; of layers of one kind, one is traced. So what
is compiled does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from backends.pytorch.ahead.onetoken import OneToken
from backends.pytorch.ahead.segments import Segments
from backends.pytorch.ahead.trace import Traced, fresh


@torch.library.custom_op("dslc::block", mutates_args=())
def _block(number: int, args: Sequence[Tensor]) -> Tensor:
    raise NotImplementedError("stands for a block while its caller is traced")


@_block.register_fake
def _(number: int, args: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(args[0])  # blocks in a chain give what they take


BLOCK = torch.ops.dslc.block.default


@dataclass
class Use:
    """One call of a piece; see ``plan.Call``."""

    piece: int
    values: list[int]
    caches: list[str]
    weights: list[str]
    results: list[int]


@dataclass
class Pieces:
    """A decode step: programs on flat lists of values, caches and weights, and their calls."""

    programs: list[ExportedProgram] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    logits: int = 0


def cut(
    model: nn.Module, entry: str, blocked: Mapping[str, tuple[int, int]] = MappingProxyType({})
) -> Pieces:
    """Trace a step of one token through an entry of an emitted model.

    Value 0 is the token, value 1 its place.

    Args:
        model: made from text that imports ``onetoken``; its weights may be fake tensors.
        blocked: see ``Traced``.

    Raises:
        NeedsWide: a blocked weight is used by more than products with rows.
        Exception: torch raises many kinds for what it cannot trace.
    """
    layers = _layers(model)
    token, index = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    with _opaque(layers):
        traced = Traced(getattr(model, entry), [token], index, model, set(layers), blocked)
        segments = Segments(traced, traced.export(), BLOCK)
    made = Pieces()
    kinds: dict[object, tuple[int, Traced]] = {}
    numbers: dict[fx.Node, int] = {node: i for i, node in enumerate(segments.values)}
    for part in segments.parts():
        if isinstance(part, fx.Node):
            layer = layers[part.args[0]]  # type: ignore[index]
            args: list[fx.Node] = list(part.args[1])  # type: ignore[arg-type]
            examples = [node.meta["val"] for node in args]
            start = f"{layer.path}."
            within = [p.removeprefix(start) for p in blocked if p.startswith(start)]
            shapes = tuple((tuple(x.shape), x.dtype) for x in examples)
            kind = (_alike(layer), shapes, tuple(sorted(within)))
            if kind not in kinds:
                plain = [fresh(x) for x in examples]
                one = Traced(_method(layer), plain, index, layer, blocked=blocked)
                kinds[kind] = (len(made.programs), one)
                made.programs.append(kinds[kind][1].export())
            piece, one = kinds[kind]
            caches = [_moved(path, one.owner, layer) for path in one.caches]
            weights = [f"{layer.path}.{path}" for path in one.weights]
            values = [*(numbers[n] for n in args), numbers[segments.values[-1]]]
            results = [part]
        else:
            piece = len(made.programs)
            made.programs.append(part.export())
            values = [numbers[n] for n in part.values]
            caches, weights, results = part.caches, part.weights, part.results
        for node in results:
            numbers[node] = len(numbers)
        made.uses.append(Use(piece, values, caches, weights, [numbers[n] for n in results]))
    made.logits = numbers[segments.output]
    return made


def _layers(module: nn.Module) -> list[nn.Module]:
    """The blocks of arrays, outermost ones only."""
    found: list[nn.Module] = []
    for child in module.children():
        array = isinstance(child, nn.ModuleList | nn.ModuleDict)
        found += child.children() if array else _layers(child)
    return found


@contextmanager
def _opaque(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within, calling a layer leaves one operation with its number in the trace."""

    def stand_in(number: int) -> Callable[..., Tensor]:
        def forward(*args: Any) -> Tensor:
            given = [a for a in args if not isinstance(a, OneToken)]
            result: Tensor = BLOCK(number, given)
            return result

        return forward

    for number, layer in enumerate(layers):
        layer.forward = stand_in(number)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _method(layer: nn.Module) -> Callable[..., Tensor]:
    """A layer's ``forward`` on (step, *args), whether it takes the step or not."""
    takes_step = type(layer).forward.__code__.co_varnames[1] == "step"

    def forward(step: OneToken, *args: Tensor) -> Tensor:
        result: Tensor = layer(step, *args) if takes_step else layer(*args)
        return result

    return forward


def _moved(path: str, first: nn.Module, layer: nn.Module) -> str:
    """A path within one layer, for another one of its kind."""
    return f"{layer.path}.{path.removeprefix(f'{first.path}.')}"


def _alike(module: nn.Module) -> object:
    """What decides which code a block traces to: its class, sizes, parameters and children."""
    plain = [
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, int | float) and name != "training" and not name.startswith("_")
    ]
    held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    tensors = [(name, tuple(t.shape), t.dtype) for name, t in held]
    children = [(name, _alike(child)) for name, child in module.named_children()]
    return (type(module).__qualname__, *sorted(plain), *tensors, *children)
