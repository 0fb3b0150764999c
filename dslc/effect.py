"""What a deployment's number formats do to a model: measured against the same model without them.

Three views, from near to far. A contraction alone: its inputs as they were before they were
quantised, its weight as the other model has it. A layer alone: fed what the other model's layer was
fed. And the model running freely: its next-token distributions and the choices it made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.pytorch.load import load
from backends.pytorch.places import source_path
from backends.pytorch.runtime.fp8 import Coded, CodedWeight, quantize, scaled_linear
from backends.pytorch.watch import Value, watching

if TYPE_CHECKING:
    from backends.pytorch.model import Model


@dataclass(frozen=True)
class Error:
    """|a - b| / |b| (2-norms) of one contraction or layer, over all of its calls."""

    path: str  # layers[3].attn.W_dq, layers[3]
    error: float


@dataclass(frozen=True)
class Effect:
    """Errors of contractions and layers by themselves; the rest of the model running freely.

    Attributes:
        kl: of next-token distributions, other || this, in nats: mean and largest over positions.
        logits: |a - b| / |b| of all logits.
        decisions: choices of blocks, over all tokens and layers, and how many fell otherwise.
    """

    contractions: list[Error]
    layers: list[Error]
    kl: tuple[float, float]
    logits: float
    decisions: int
    changed: int


def is_quantised(model: Model) -> bool:
    return any(row.stored is not None for row in model.manifest.parameters)


def effect(
    directory: Path,
    other: Path,
    checkpoint: Path | None,
    dtype: torch.dtype,
    tokens: Sequence[int],
    note: Callable[[str], None],
    edited: bool = False,
) -> Effect:
    """Run a quantised model and the same without, both in memory at once.

    Args:
        other: the directory without the deployment.
    """
    a = load(directory, checkpoint, dtype=dtype, note=lambda _: None, edited=edited)
    b = load(other, checkpoint, dtype=dtype, note=note, edited=edited)
    given = torch.tensor([list(tokens)])
    contractions: dict[str, list[tuple[float, float]]] = {}
    with torch.no_grad():
        with watching(b) as theirs, _recorded(b) as inputs:
            expected = b(given)[0]
        with watching(a) as ours, _measured(a, b, contractions):
            found = a(given)[0]
        layers: dict[str, list[tuple[float, float]]] = {}
        with _fed(a, inputs, layers):
            a(given)
    kl = _divergence(found, expected)
    decisions, changed = _decisions(ours, theirs)
    return Effect(
        [Error(path, _ratio(parts)) for path, parts in contractions.items()],
        [Error(path, _ratio(parts)) for path, parts in layers.items()],
        (float(kl.mean()), float(kl.max())),
        _ratio([_squares(found, expected)]),
        decisions,
        changed,
    )


def _squares(a: Tensor, b: Tensor) -> tuple[float, float]:
    a, b = a.double(), b.double()
    return float((a - b).square().sum()), float(b.square().sum())


def _ratio(parts: Sequence[tuple[float, float]]) -> float:
    apart, size = (sum(part[i] for part in parts) for i in (0, 1))
    return (apart / size) ** 0.5 if size else (float("inf") if apart else 0.0)


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """[time]: KL of the second's distributions to the first's."""
    mine, theirs = (F.log_softmax(logits.double(), -1) for logits in (a, b))
    return (theirs.exp() * (theirs - mine)).sum(-1)


def _decisions(ours: list[Value], theirs: list[Value]) -> tuple[int, int]:
    """Whole numbers that the models name are choices; how many of the one's the other lacks."""
    count = changed = 0
    picked = [[v for v in values if v.tensor.dtype == torch.int64] for values in (ours, theirs)]
    for a, b in zip(*picked, strict=False):
        if (a.path, a.tensor.shape) != (b.path, b.tensor.shape) or a.tensor.ndim < 2:
            continue
        same = (a.tensor[..., :, None] == b.tensor[..., None, :]).any(-1)
        count += same.numel()
        changed += int((~same).sum())
    return count, changed


# -- contractions ----------------------------------------------------------------------------------


@contextmanager
def _measured(
    model: Model, other: Model, into: dict[str, list[tuple[float, float]]]
) -> Iterator[None]:
    """Within, every product with a stored matrix is also taken of the values as they were."""
    names = {id(weight): path for path, weight in model.module.named_parameters()}
    wide = dict(other.module.named_parameters())

    def keeping(x: Tensor, *arguments: Any, **options: Any) -> Coded:
        return quantize(x, *arguments, **options).of(x)

    def measuring(x: Coded, weight: Tensor, *arguments: Any, **options: Any) -> Tensor:
        found = scaled_linear(x, weight, *arguments, **options)
        path = names.get(id(weight))
        if path is not None and path in wide and x.exact is not None:
            exact = x.exact.flatten(-x.columns).double()
            stored = wide[path].detach()
            stored = stored.wide() if isinstance(stored, CodedWeight) else stored
            product = F.linear(exact, stored.double().flatten(1))
            into.setdefault(source_path(path), []).append(_squares(found, product))
        return found

    code = vars(sys.modules[type(model.module).__module__])
    before = {name: code.get(name) for name in ("quantize", "scaled_linear")}
    code.update(quantize=keeping, scaled_linear=measuring)
    try:
        yield
    finally:
        code.update(before)


# -- layers ----------------------------------------------------------------------------------------

Call = tuple[Tensor, Tensor]  # what a layer carries on, and what it gives


def _layers(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Blocks of arrays of the model itself: what it runs one after the other."""
    for name, module in model.module.named_modules():
        if name.count(".") == 1 and name.rpartition(".")[2].isdigit():
            yield source_path(name), module


def _carried(arguments: tuple[Any, ...]) -> int | None:
    """Which argument of a layer is carried from layer to layer: its first floating tensor."""
    for at, value in enumerate(arguments):
        if isinstance(value, Tensor) and value.is_floating_point():
            return at
    return None


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recorded(model: Model) -> Iterator[dict[str, list[Call]]]:
    """Within, what each layer is given and gives is added to the lists."""
    calls: dict[str, list[Call]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            at = _carried(given)
            if at is not None and isinstance(out, Tensor) and out.shape == given[at].shape:
                calls.setdefault(path, []).append((given[at].clone(), out.clone()))

        return hook

    with _hooked([m.register_forward_hook(keep(path)) for path, m in _layers(model)]):
        yield calls


@contextmanager
def _fed(
    model: Model, inputs: dict[str, list[Call]], into: dict[str, list[tuple[float, float]]]
) -> Iterator[None]:
    """Within, each layer gets what the other model's layer got; what it adds is compared."""
    numbers: dict[str, int] = {}

    def feed(path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> Any:
            at, number = _carried(given), numbers.get(path, 0)
            if at is None or number >= len(inputs.get(path, [])):
                return None
            return (*given[:at], inputs[path][number][0].clone(), *given[at + 1 :])

        return hook

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            number = numbers.get(path, 0)
            numbers[path] = number + 1
            if number < len(inputs.get(path, [])):
                before, theirs = inputs[path][number]
                added = _squares(out - before, theirs - before)
                into.setdefault(path, []).append(added)

        return hook

    handles = [m.register_forward_pre_hook(feed(path)) for path, m in _layers(model)]
    handles += [m.register_forward_hook(keep(path)) for path, m in _layers(model)]
    with _hooked(handles):
        yield
