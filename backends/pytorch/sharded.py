"""A model whose ranks work together: each has its part of the weights, and its own sequences.

Every rank is given the same calls with the same arguments and returns the same results, so that
whoever calls need not know of it. Within a step a rank runs its own sequences, which are dealt out
in contiguous runs over the mesh axes of the batch, and the rows that are wanted are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from backends.pytorch import sampling
from backends.pytorch.inputs import InputError
from backends.pytorch.model import KEPT_AS_CODES, IncompatibleKeys, Model
from backends.pytorch.names import attribute_path
from backends.pytorch.runtime import Cache, Mesh, Step
from backends.pytorch.runtime.routing import Placement
from backends.pytorch.weights.checkpoint import Match, Source
from backends.pytorch.weights.problems import message, told
from backends.pytorch.weights.slices import own, part_of, places
from compiler.manifest import Manifest
from compiler.shards import OwnTensor
from compiler.tensors import Pattern

NO_TOKEN = -1  # of a sequence whose logits are NaN


class ShardedCache(Cache):
    """The lengths and tokens of all sequences, and the values of this rank's own.

    Attributes:
        own: this rank's slots; ``local`` is their cache, in this order.
    """

    def __init__(self, slots: int, capacity: int | None, own: range):
        super().__init__(slots, capacity)
        self.own = own
        self.local = Cache(len(own), capacity)

    @property
    def nbytes(self) -> int:
        return self.local.nbytes

    def _cut(self, slot: int, length: int) -> None:
        if slot in self.own:
            self.local._cut(slot - self.own.start, length)
        super()._cut(slot, length)

    def truncate(self, lengths: Sequence[int] | Tensor, slots: Sequence[int] | None = None) -> None:
        self._latest = self.local._latest  # whether there are states
        super().truncate(lengths, slots)


class ShardedModel(Model):
    """One rank of a model. Nothing flows back through what ranks send each other: no gradients.

    Attributes:
        mesh: the ranks.
        bytes_read: of the checkpoint, by this rank. ``bytes_compared``: read once more, as ranks
            have copies of it: what another rank has loaded.
    """

    mesh: Mesh
    bytes_read: int
    bytes_compared: int = 0
    _apart: bool = False  # rows stay with the rank that has their sequence
    _slots = range(0)  # this rank's sequences in the last step

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.choose = self._choose

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """Within, rows of logits are not gathered: each rank chooses for its own sequences."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def _choose(self, logits: Tensor, rows: Sequence[int], step: int, *how: Any) -> Tensor:
        """As ``sampling.choose``: every rank for its own sequences, in turns with those that
        have the same ones; all get the tokens."""
        mesh = self.mesh
        others = [axis for axis in mesh.sizes if axis not in self.manifest.batch]
        own = [i for i, row in enumerate(rows) if row in self._slots]
        mine = own[mesh.index(*others) :: mesh.ways(*others)]
        tokens = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
        if mine:
            some = logits[mine]
            nan = some.amax(-1).isnan()
            chosen = sampling.choose(some.nan_to_num(), [rows[i] for i in mine], step, *how)
            tokens[mine] = torch.where(nan, NO_TOKEN, chosen)
        tokens = torch.stack(mesh.group(*mesh.sizes).all_gather(tokens)).sum(0)
        sampling.refuse_nan(tokens == NO_TOKEN, rows, step)
        return tokens

    @torch.no_grad()
    def _computed(self, entry: str, step: Step, inputs: Mapping[str, Tensor]) -> Tensor:
        batch = self.manifest.batch
        ways = self.mesh.ways(*batch)
        numbers = step.slots if step.cache is not None else range(step.batch)
        among = step.cache.slots if step.cache is not None else step.batch
        self._slots = _own(among, self.mesh, batch)
        owner = torch.tensor([_owner(n, among, ways) for n in numbers], dtype=torch.int64)
        owner = owner.repeat_interleave(torch.tensor(step.counts, dtype=torch.int64))
        mine = owner == self.mesh.index(*batch)
        rows = torch.arange(step.total) if step.rows is None else step.rows.cpu()
        given = {name: x[mine.to(x.device)] for name, x in inputs.items()}
        local = self._local(step, numbers, among, mine, rows)
        # All ranks decide alike: two micro-batches, if any rank has sequences for both.
        runs = (range(among * i // ways, among * (i + 1) // ways) for i in range(ways))
        local.may_halve = any(sum(n in run for n in numbers) > 1 for run in runs)
        result = super()._computed(entry, local, given)
        local.commit()
        if ways == 1:
            return result
        if self._apart:
            apart = result.new_empty(len(rows), *result.shape[1:])
            apart[mine[rows].to(apart.device)] = result
            return apart
        return self._gathered(result, owner[rows], batch)

    def _local(
        self, step: Step, numbers: Sequence[int], among: int, mine: Tensor, rows: Tensor
    ) -> Step:
        """The part of a step that is this rank's."""
        own = _own(among, self.mesh, self.manifest.batch)
        chosen = [i for i, number in enumerate(numbers) if number in own]
        place = mine.cumsum(0) - 1  # of each token of the step among this rank's
        cache = step.cache.local if isinstance(step.cache, ShardedCache) else None
        return Step(
            [step.counts[i] for i in chosen],
            device=step.device,
            cache=cache,
            slots=[numbers[i] - own.start for i in chosen] if cache is not None else None,
            position=None if step.in_order else step.position[mine.to(step.device)],
            rows=None if step.rows is None else place[rows[mine[rows]]].to(step.device),
        )

    def _gathered(self, result: Tensor, owner: Tensor, batch: Sequence[str]) -> Tensor:
        """All ranks' rows, in the order of the step."""
        group = self.mesh.group(*batch)
        counts = torch.bincount(owner, minlength=group.size).tolist()
        padded = result.new_zeros(max(counts), *result.shape[1:])
        padded[: len(result)] = result
        whole = result.new_empty(len(owner), *result.shape[1:])
        for rank, part in enumerate(group.all_gather(padded)):
            whole[(owner == rank).to(whole.device)] = part[: counts[rank]]
        return whole

    def new_cache(self, batch: int, capacity: int | None = None) -> Cache:
        return ShardedCache(batch, capacity, _own(batch, self.mesh, self.manifest.batch))

    # -- weights ----------------------------------------------------------------------------------

    def owns(self, patterns: Sequence[Pattern]) -> None:
        """Tell which parts of stored tensors this rank has."""
        self._patterns = list(patterns)
        self.register_state_dict_post_hook(_as_parts)

    def own_tensors(self) -> dict[str, OwnTensor]:
        """By the attribute path of each parameter and state that is there."""
        tensors = (t for pattern in self._patterns for t in pattern.tensors())
        found = {attribute_path(t.path): t for t in tensors if isinstance(t, OwnTensor)}
        return {path: t for path, t in found.items() if path in self._names}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Replace this rank's weights.

        Args:
            state_dict: by the checkpoint's names, this rank's parts, as its own ``state_dict`` has
                them, or whole tensors, of which it takes its part; others' are passed over.
        """
        own = self.own_tensors()
        mine = {tensor.name for tensor in own.values()}
        all_ranks = {t.name for row in self.manifest.parameters for t in row.pattern().tensors()}
        missing = sorted(mine - state_dict.keys())
        unexpected = sorted(state_dict.keys() - all_ranks)
        taken, wrong = dict[str, Tensor](), list[tuple[str, str]]()
        for path, tensor in own.items():
            given = state_dict.get(tensor.name)
            if given is None:
                continue
            given = given.to_local() if hasattr(given, "to_local") else given
            if given.shape not in (tensor.shape, tensor.stored_shape):
                shapes = f"{list(tensor.stored_shape)}, or of this rank {list(tensor.shape)}"
                wrong.append((tensor.name, f"expected {shapes}; found {list(given.shape)}"))
            elif given.shape == tensor.shape:
                taken[path] = given
            else:
                taken[path] = part_of(given, tensor)
        if strict:
            wrong += [(name, "missing") for name in missing]
            wrong += [(name, "not one of the model's") for name in unexpected]
        if wrong:
            raise InputError(message("the state dict does not fit:", told(wrong)))
        if not assign and any(isinstance(w, KEPT_AS_CODES) for w in self.module.parameters()):
            raise InputError("weights that are kept in FP8 cannot be replaced: pass assign=True")
        self.module.load_state_dict(taken, strict=False, assign=assign)
        return IncompatibleKeys(missing, unexpected)


def _as_parts(model: ShardedModel, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    """What is divided says so: ``torch.distributed.checkpoint`` would take it for whole."""
    from backends.pytorch.weights.saving import Part

    for tensor in model.own_tensors().values():
        name = prefix + tensor.name
        if name in state_dict and not tensor.is_whole:
            state_dict[name] = Part(state_dict[name], tensor)


def _owner(number: int, among: int, ways: int) -> int:
    """Which rank has a sequence: they have contiguous runs of lengths that differ by one at most,
    and none where there are more ranks than sequences."""
    return next(i for i in range(ways) if among * i // ways <= number < among * (i + 1) // ways)


def _own(among: int, mesh: Mesh, batch: Sequence[str]) -> range:
    ways, place = mesh.ways(*batch), mesh.index(*batch)
    return range(among * place // ways, among * (place + 1) // ways)


def own_part(
    manifest: Manifest,
    mesh: Mesh,
    placements: Mapping[str, Sequence[int]],
    unavailable: Mapping[str, Sequence[str]],
    found: Match | None,
) -> tuple[list[Pattern], list[Pattern], Match | None]:
    """This rank's patterns, those of them that an entry needs, and their sources."""
    patterns = own(manifest, mesh, placements)
    needed = [p for p in patterns if not p.entries or set(p.entries) - unavailable.keys()]
    if found is None:
        return patterns, needed, None
    by_name = {source.tensor.name: source for source in found.sources}
    sources: list[Source] = []
    for pattern in needed:
        own_tensors = [t for t in pattern.tensors() if t.name in by_name]
        sources += [replace(by_name[t.name], tensor=t) for t in own_tensors]
    return patterns, needed, replace(found, sources=sources)


def place_blocks(model: ShardedModel, placements: Mapping[str, Sequence[int]]) -> None:
    """Tell the mesh which copies of blocks there are."""
    for path, numbers in places(model.manifest, model.mesh, placements).items():
        model.mesh.placements[path] = Placement.of(numbers, len(set(numbers)))
