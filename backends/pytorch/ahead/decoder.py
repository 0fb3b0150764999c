"""Running a decode step that was compiled ahead of time."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from backends.pytorch.ahead.blocks import BlockedWeight
from backends.pytorch.ahead.plan import FILE_NAME, SCALE, Plan
from backends.pytorch.ahead.processor import features
from backends.pytorch.names import attribute_path
from backends.pytorch.runtime import Step
from backends.pytorch.weights.checkpoint import Match
from compiler.manifest import ManifestError

Run = Callable[[list[Tensor]], list[Tensor]]
Held = Mapping[str, Tensor | None]


def read_plan(files: Mapping[str, bytes]) -> Plan | None:
    """The plan among a compiled directory's files; None if it was compiled without.

    Raises:
        ManifestError: it is not one, or names files that are not there.
    """
    if FILE_NAME not in files:
        return None
    try:
        plan = Plan.model_validate_json(files[FILE_NAME])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ManifestError(f"{FILE_NAME}: {place}: {first['msg']}") from None
    for name in sorted(plan.packages):
        if name not in files:
            raise ManifestError(f"{FILE_NAME} names {name}, which is not there")
    return plan


def obstacle(
    plan: Plan, device: torch.device, dtype: torch.dtype, found: Match | None = None
) -> str | None:
    """Why a plan cannot be run here; None if it can.

    Args:
        found: the checkpoint that is to be loaded.
    """
    if plan.block:
        if found is None or found.checkpoint.block != plan.block:
            return f"it is for FP8 weights in blocks of {plan.block[0]} x {plan.block[1]}"
        for source in found.sources:
            path = attribute_path(source.tensor.path)
            if source.scale is None and plan.place(path)[0] in plan.blocked:
                return f"it is for FP8 weights, and {source.stored.name} is not"
    if device.type != "cpu":
        return f"it is for the CPU, the model is on {device}"
    if str(dtype).removeprefix("torch.") != plan.dtype:
        return f"it is for {plan.dtype}, the model is in {str(dtype).removeprefix('torch.')}"
    if plan.torch != torch.__version__:
        return f"torch {plan.torch} compiled it, this is {torch.__version__}"
    here = platform.machine()
    if plan.machine != here:
        return f"it was compiled for another CPU ({plan.machine}, not {here})"
    if lacking := sorted(set(plan.features) - set(features())):
        return f"it was compiled for another CPU ({', '.join(lacking[:3])} is not there)"
    return None


@dataclass(frozen=True)
class _Bound:
    """A call whose weights have been found."""

    run: Run
    values: tuple[int, ...]
    caches: tuple[str, ...]
    weights: list[Tensor]


class Decoder:
    """The next token of one sequence, from the weights and caches of a model that is loaded."""

    def __init__(
        self,
        plan: Plan,
        pieces: Mapping[str, Run],
        weight: Callable[[str], Tensor],
        module: nn.Module,
    ):
        """
        Args:
            pieces: by the plan's names, what runs each.
            weight: gives the tensor of an attribute path; of an array's path, with ``*`` for the
                number, all of its blocks' stacked.
            module: the emitted model, which has them.
        """
        self._plan = plan
        self._calls = [
            _Bound(pieces[c.piece], c.values, c.caches, [weight(path) for path in c.weights])
            for c in plan.calls
        ]
        self._caches = [path for call in plan.calls for path in call.caches]
        self._held = list(_held(plan, module))

    def takes(self, step: Step) -> bool:
        """Is this the next token of one sequence, whose first ones have made the caches?

        And are the weights still in the memory that this reads? Writing to them in place is seen; a
        weight that was replaced is not, and then ``model.py`` runs. Of an array of blocks the first
        is looked at: all of them would take longer than a small layer.
        """
        cache = step.cache
        return (
            cache is not None
            and step.counts == (1,)
            and step.starts[0] > 0
            and step.in_order
            and (step.rows is None or step.rows.tolist() == [0])
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and all(cache.holds(path) for path in self._caches)
            and all(_address(held, name) == there for held, name, there in self._held)
        )

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the model has weights of its own."""

    def step(self, token: Tensor, step: Step) -> Tensor:
        """Logits [1, vocab] of a token, int64 [1]; the caches hold its values."""
        assert step.cache is not None
        step.cache.reserve(step.history)
        values = [token, torch.tensor(step.starts)]
        for call in self._calls:
            given = [values[i] for i in call.values]
            given += [step.cache.history(path, step.slots[0], step.history) for path in call.caches]
            values += call.run(given + call.weights)
        return values[self._plan.logits]


def _held(plan: Plan, module: nn.Module) -> Iterator[tuple[Held, str, object]]:
    """Where the weights are that a plan reads; of an array, those of its first block."""
    for path in dict.fromkeys(path for call in plan.calls for path in call.weights):
        if path.endswith(SCALE):
            continue
        array, star, rest = path.partition(".*.")
        if star:
            first = next(name for name, _ in module.get_submodule(array).named_children())
            path = f"{array}.{first}.{rest}"
        place, _, name = path.rpartition(".")
        owner = module.get_submodule(place)
        held: Held = owner._parameters if name in owner._parameters else owner._buffers
        yield held, name, _address(held, name)


def _address(held: Held, name: str) -> object:
    tensor = held.get(name)
    if tensor is None:
        return None
    # One that is kept as bytes has no memory of its own.
    return id(tensor) if isinstance(tensor, BlockedWeight) else tensor.data_ptr()


def loaded(plan: Plan, files: Mapping[str, bytes]) -> dict[str, Run]:
    """A plan's pieces, from the very bytes that were checked.

    Raises:
        ManifestError: torch cannot load one.
    """
    try:
        return {name: _loaded(files[name]) for name in sorted(plan.packages)}
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ManifestError(f"the compiled decode step cannot be loaded: {reason}") from None


def _loaded(package: bytes) -> Run:
    with tempfile.TemporaryDirectory() as folder:  # torch unpacks it to a place of its own
        path = Path(folder) / "piece.pt2"
        path.write_bytes(package)
        # Here, not above: it takes seconds to import, and most runs have no compiled step.
        from torch._inductor.package.package import load_package

        loader: Any = load_package(str(path), run_single_threaded=True).loader
    run: Run = loader.run
    return run
