"""A compiled model as a ``torch.nn.Module``: [batch, time] around the emitted packed step."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backends.pytorch import generate as generation
from backends.pytorch.ahead.blocks import BlockedWeight
from backends.pytorch.ahead.decoder import Decoder
from backends.pytorch.ahead.rows import FewRows
from backends.pytorch.inputs import (
    InputError,
    NotAvailable,
    check_context,
    counts_of,
    packed,
    unpacked,
)
from backends.pytorch.memory import require
from backends.pytorch.names import attribute_path
from backends.pytorch.places import located
from backends.pytorch.replay import Replays
from backends.pytorch.runtime import Cache, Step
from backends.pytorch.runtime.fp8 import CodedWeight, moved_codes
from backends.pytorch.runtime.paged import PagedCache
from backends.pytorch.sampling import choose
from backends.pytorch.weights.problems import listing, message, told
from compiler.errors import UserError
from compiler.manifest import EntryRow, Manifest

KEPT_AS_CODES = (BlockedWeight, CodedWeight)


class IncompatibleKeys(NamedTuple):
    """What ``load_state_dict`` of other modules returns too."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Model(nn.Module):
    """What ``load`` returns. Beside ``forward`` there is one method per entry of the source, called
    like ``forward``: ``model.draft(tokens, lengths)``.

    Attributes:
        manifest: what was compiled.
        module: the emitted model, whose methods take packed steps.
        notes: what loading had to say, one sentence each.
        code: the text of the emitted ``model.py``.
    """

    def __init__(
        self,
        module: nn.Module,
        manifest: Manifest,
        names: Mapping[str, str],
        unavailable: Mapping[str, Sequence[str]],
        notes: Sequence[str] = (),
        source: str | None = None,
        code: str = "",
    ):
        """
        Args:
            names: the checkpoint's name of each parameter and state of ``module``.
            unavailable: entries that cannot be run, and the tensors they lack.
            source: the text of the graph that names every value of the source, for ``trace``.
            code: the text of ``module``'s file.
        """
        super().__init__()
        self.module = module
        self.manifest = manifest
        self.notes = list(notes)
        self.code = code
        self._names = dict(names)
        self._unavailable = dict(unavailable)
        self._source = source
        self._decoder: Decoder | None = None
        self._products: FewRows | None = None
        self.replays = Replays()
        self.choose: Callable[..., Tensor] = choose  # the next tokens, from logits
        self.register_state_dict_post_hook(_rename_to_checkpoint)

    def ahead(self, decoder: Decoder | None, products: FewRows | None) -> Model:
        """This model, with code that was compiled ahead of time.

        Args:
            decoder: takes the steps of one token of one sequence in the place of ``module``.
            products: within it, ``module`` multiplies faster. Not where gradients are wanted.
        """
        self._decoder, self._products = decoder, products
        return self

    # -- running ----------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the entry ``main``.

        Args:
            tokens: int64 [batch, time], padded on the right.
            lengths: int64 [batch], how many of them count; all unless given. 0 lets a sequence sit
                out, which takes a cache.
            cache: what came before; the tokens go on from there and are added to it. No gradient
                flows through a step with a cache.
            last_only: only the last row of each sequence: the result is [batch, 1, vocab].

        Returns:
            [batch, time, vocab] in the model's dtype; rows past a sequence's length are zero.

        Raises:
            InputError: wrong shapes, dtypes, lengths or token numbers; more positions than the
                model is made for.
            CacheFull: more positions than the cache has room for.
        """
        return self.run("main", (tokens,), lengths, cache, last_only)

    def run(
        self,
        entry: str,
        inputs: Sequence[Tensor],
        lengths: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Any entry. ``inputs`` are those of its arguments that are not another one shifted; of a
        shifted one, the last rows have none and are dropped: [batch, time - shift, ...].

        Raises:
            InputError: see ``forward``.
            NotAvailable: the checkpoint lacked tensors of this entry.
        """
        row = self._entry(entry)
        given = [i for i in row.inputs if i.shift_of is None]
        if len(inputs) != len(given):
            wanted = ", ".join(i.name for i in given)
            raise InputError(f"'{entry}' takes {len(given)} inputs ({wanted}), not {len(inputs)}")
        counts, time = counts_of(given[0].name, inputs, lengths, cache)
        shift = max((i.shift for i in row.inputs if i.shift_of is not None), default=0)
        by_name = {i.name: x for i, x in zip(given, inputs, strict=True)}
        rows = {
            i.name: packed(i, by_name[i.shift_of or i.name], counts, i.shift, shift - i.shift)
            for i in row.inputs
        }
        counts = [max(0, n - shift) for n in counts]
        step = Step(counts, device=self.device, cache=cache, last_only=last_only)
        # Values in a cache have no gradient: with one, better none at all than a part of it.
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            result = self.step(entry, step, rows)
            return unpacked(result, step, max(0, time - shift), last_only)

    def step(self, entry: str, step: Step, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run a packed step, for callers that batch for themselves.

        Args:
            inputs: every input of the entry, packed [total, ...].

        Returns:
            [rows wanted, ...]; the cache counts the step's positions from now on.

        Raises:
            RunError: an equation could not be computed; says which line of the source it is.
        """
        row = self._entry(entry)
        check_context(self.manifest, step.history)
        if step.cache is not None:
            self.make_room(step.cache, step.history)
        if step.total == 0:
            shape = [n for n in row.shape[1:] if isinstance(n, int)]
            return torch.zeros(0, *shape, dtype=self.dtype, device=self.device)
        rows = self._computed(entry, step, inputs)
        step.commit()
        self._remember(row, step, inputs)
        return rows

    def choosing(self) -> AbstractContextManager[None]:
        """Within, steps are run for ``choose`` alone, which need not have every row."""
        return nullcontext()

    def _computed(self, entry: str, step: Step, inputs: Mapping[str, Tensor]) -> Tensor:
        """The rows wanted of a step that may be run."""
        row = self._entry(entry)
        given = [self._placed(inputs[i.name]) for i in row.inputs]
        rows: Tensor
        try:
            if entry == "main" and self._decoder and self._decoder.takes(step):
                token, below = given[0].long(), row.inputs[0].below
                if below is not None and not 0 <= int(token) < below:
                    raise InputError(f"token {int(token)} is not one of 0 .. {below - 1}")
                rows = self._decoder.step(token, step)
            else:
                fast = None if torch.is_grad_enabled() else self._products
                with fast or nullcontext():
                    rows = getattr(self.module, entry)(step, *given)
        except UserError:
            raise
        except Exception as error:
            place = located(error)
            if place is None:
                raise
            raise place from error
        return rows if row.shape[0] == "wanted" else step.select(rows)

    def _remember(self, row: EntryRow, step: Step, inputs: Mapping[str, Tensor]) -> None:
        """Let the cache know which tokens its positions came from, where tokens are all they came
        from: ``generate`` then goes on from them."""
        known = len(row.inputs) == 1 and row.inputs[0].below is not None
        if step.cache is None or not known or not step.in_order:
            return
        if row is not self.manifest.entries["main"]:
            return  # another entry may not fill all that main reads
        parts = inputs[row.inputs[0].name].split(step.counts)
        for slot, start, part in zip(step.slots, step.starts, parts, strict=True):
            step.cache.remember(slot, start, part.tolist())

    def make_room(self, cache: Cache, positions: int) -> None:
        """Find out whether a cache can hold so many positions of a sequence, before any is run.

        Raises:
            CacheFull: it has a fixed capacity, which is smaller.
            MemoryNeeded: it would grow, and that does not fit.
        """
        if not cache.grows or positions <= cache.capacity:
            cache.reserve(positions)
            return
        require(
            f"a cache of {cache.slots:,} x {positions:,} positions",
            cache.slots * positions * self.cache_bytes_per_token(),
            self.device,
        )

    def _placed(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)

    def new_cache(self, batch: int, capacity: int | None = None) -> Cache:
        """An empty cache for ``batch`` sequences.

        Args:
            capacity: positions per sequence; unless given, it grows as needed.

        Raises:
            MemoryNeeded: that many positions do not fit.
        """
        if capacity is not None:
            require(
                f"a cache of {batch:,} x {capacity:,} positions",
                batch * (capacity * self.cache_bytes_per_token() + self.state_bytes()),
                self.device,
            )
        return (Cache if self.manifest.target == "cpu" else PagedCache)(batch, capacity)

    generate = generation.generate

    def trace(self, names: Sequence[str], tokens: Tensor, entry: str = "main") -> dict[str, Tensor]:
        """Named values of the source, computed by the reference interpreter.

        Args:
            names: ``layers[3].attn.c_kv``: the path of a block, and a name in it.
            tokens: int64 [batch, time].

        Returns:
            By name [batch, ...], the dims in the order of the source.

        Raises:
            InputError: there is no such value, or the tokens cannot be run.
        """
        from backends.pytorch.trace import trace  # the interpreter is not needed to run a model

        counts_of("tokens", [tokens], None, None)
        if self._source is None:
            raise InputError("the compiled directory does not hold the graph of the source")
        return trace(self, self._source, entry, names, tokens)

    # -- weights ----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and activations that do not say otherwise."""
        for row in self.manifest.parameters:
            if row.format == "act" and row.role == "param":
                tensor = self.weight(next(row.pattern().tensors()).path)
                if tensor is not None:
                    return tensor.dtype
        return next(self.module.parameters()).dtype

    @property
    def decodes_ahead(self) -> bool:
        """Is there a step of one token that was compiled ahead of time, for these weights?"""
        return self._decoder is not None

    def weight(self, path: str) -> Tensor | None:
        """A parameter or state by its path in the source; None if the checkpoint lacked it."""
        owner, _, name = attribute_path(path).rpartition(".")
        tensor: Tensor | None = getattr(self.module.get_submodule(owner), name)
        return tensor

    def cache_bytes_per_token(self, entry: str = "main") -> int:
        """Bytes that one position of one sequence takes in a cache."""
        return self._kept(entry, states=False)

    def state_bytes(self, entry: str = "main") -> int:
        """Bytes that a sequence takes in a cache however long it is: states, last positions."""
        return self._kept(entry, states=True)

    def _kept(self, entry: str, states: bool) -> int:
        width = {"act": self.dtype.itemsize, "f32": 4, "i64": 8, "bool": 1}
        rows = [
            r for r in self.manifest.caches if entry in r.entries and states == (r.last is not None)
        ]
        return sum(row.pattern().elements * width[row.format] for row in rows)

    def named_parameters(self, prefix: str = "", *arguments: Any, **options: Any) -> Any:
        """As of any module, but by the checkpoint's names."""
        for name, parameter in super().named_parameters(prefix, *arguments, **options):
            start = f"{prefix}." if prefix else ""
            yield start + self._names[name.removeprefix(f"{start}module.")], parameter

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._decoder = None  # it has the weights that there were
        self.replays.forget()
        (change, *_) = arguments
        coded = moved_codes(self.module, change)
        for module in self.module.modules():
            held: dict[str, Any] = module._parameters
            for name, weight in held.items():
                if isinstance(weight, BlockedWeight):
                    held[name] = nn.Parameter(weight.wide(), requires_grad=False)
        with coded:
            return super()._apply(*arguments, **options)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of any module; ``state_dict`` has the checkpoint's names."""
        ours = {name: path for path, name in self._names.items()}
        mine = super().state_dict()  # by the checkpoint's names
        missing = sorted(mine.keys() - state_dict.keys())
        unexpected = sorted(state_dict.keys() - mine.keys())
        shapes = [
            (name, f"expected {list(mine[name].shape)}, found {list(tensor.shape)}")
            for name, tensor in state_dict.items()
            if name in mine and mine[name].shape != tensor.shape
        ]
        if shapes or (strict and (missing or unexpected)):
            wrong = [(name, "missing") for name in missing if strict]
            wrong += [(name, "not one of the model's") for name in unexpected if strict]
            raise InputError(message("the state dict does not fit:", told(wrong + shapes)))
        if not assign and any(isinstance(w, KEPT_AS_CODES) for w in self.module.parameters()):
            raise InputError("weights that are kept in FP8 cannot be replaced: pass assign=True")
        self._decoder = None if assign else self._decoder
        self.replays.forget()
        known = {ours[name]: tensor for name, tensor in state_dict.items() if name in mine}
        self.module.load_state_dict(known, strict=False, assign=assign)
        return IncompatibleKeys(missing, unexpected)

    def save(self, folder: str | Path, checkpoint: str | Path | None = None) -> None:
        """Write the weights as a Hugging Face checkpoint: ``weights.saving.save``."""
        from backends.pytorch.weights.saving import save

        save(self, folder, checkpoint)

    # -- what callers ask for ---------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        manifest = self.__dict__.get("manifest")  # not there yet while a model is made
        if manifest is not None and name in manifest.entries:
            return partial(self._call, name)
        return super().__getattr__(name)

    def _call(
        self,
        entry: str,
        *inputs: Tensor,
        cache: Cache | None = None,
        last_only: bool = False,
        **lengths: Tensor | None,
    ) -> Tensor:
        """``model.<entry>(*inputs, lengths=None, ...)``, lengths by position or by name."""
        takes = sum(i.shift_of is None for i in self._entry(entry).inputs)
        if set(lengths) - {"lengths"} or len(inputs) > takes + 1:
            raise InputError(f"'{entry}' takes {takes} inputs, lengths, cache and last_only")
        given = inputs[takes] if len(inputs) > takes else lengths.get("lengths")
        return self.run(entry, inputs[:takes], given, cache, last_only)

    def _entry(self, entry: str) -> EntryRow:
        if entry not in self.manifest.entries:
            near = difflib.get_close_matches(entry, self.manifest.entries, n=1)
            raise InputError(f"there is no entry '{entry}'; there is '{(near or ['main'])[0]}'")
        if entry in self._unavailable:
            lacking = list(self._unavailable[entry])
            raise NotAvailable(
                f"'{entry}' is not available: the checkpoint lacks {listing(lacking, 3)}"
            )
        return self.manifest.entries[entry]


def _rename_to_checkpoint(
    model: Model, state_dict: dict[str, Any], prefix: str, metadata: object
) -> None:
    for path, name in model._names.items():
        key = f"{prefix}module.{path}"
        if key in state_dict:
            tensor = state_dict.pop(key)
            tensor = tensor.wide() if isinstance(tensor, KEPT_AS_CODES) else tensor
            state_dict[prefix + name] = tensor
