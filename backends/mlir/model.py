"""A compiled module with its weights: logits and generation, with numpy and IREE's runtime alone.

model = load("build/small", checkpoint="path")
logits = model(tokens, lengths)             # int64 [batch, time] -> float32 [batch, time, vocab]
sequences = model.generate([[1, 2, 3]], max_new_tokens=8)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.mlir.archive import Note, weights_of
from backends.mlir.artifact import BYTES, INSTALL, Layout, layout_of
from backends.mlir.sampling import choose
from backends.mlir.session import Cache, Session
from backends.pytorch.asked import InputError, check_context, check_prompts, check_sampling
from backends.pytorch.stopping import Endings, Stop
from backends.pytorch.text import Tokenizer
from compiler.errors import UserError
from compiler.manifest import Manifest, ManifestError, read, verified_files

# What bounds the memory of a long prefill: tokens of all sequences in one step (routing compares
# each pick with all others), and numbers held for pairs of a token and a position (256 MB of f32).
PREFILL_TOKENS = 1024
PREFILL_PAIRS = 1 << 26
FEWEST = 16
ENDED = -1


def load(
    directory: Path | str,
    checkpoint: Path | str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    note: Note = lambda _: None,
) -> Model:
    """Load what ``dslc compile --backend mlir`` wrote.

    Args:
        checkpoint: a Hugging Face checkpoint folder; without one, weights are random.
        dtype: what the caller wants to run in: the module is compiled for one.
        seed: of random weights, each a function of the seed and its tensor's name.
        note: told, in a sentence each, what the user should know.

    A checkpoint's weights are laid out once, in a file beside the directory, and mapped.

    Raises:
        ManifestError: the directory is not whole, was changed, is another backend's or for
            another processor.
        CheckpointError: the checkpoint does not fit.
        MemoryNeeded: weights that cannot be mapped do not fit into memory.
        InputError: another dtype is asked for.
        UserError: IREE's runtime is not installed.
    """
    directory = Path(directory)
    manifest = read(directory)
    if manifest.backend != "mlir":
        raise ManifestError(f"{directory} was compiled for the backend '{manifest.backend}'")
    files = verified_files(directory, manifest)
    layout = layout_of(files, manifest)
    if dtype not in (None, layout.dtype):
        raise InputError(f"{directory} was compiled for {layout.dtype}, not for {dtype}")
    try:
        import iree.runtime
        import iree.runtime.version
    except ImportError:
        raise UserError(f"{directory} needs IREE's runtime: {INSTALL}") from None
    folder = Path(checkpoint) if checkpoint is not None else None
    weights = weights_of(layout, manifest, directory, folder, seed, progress, note)
    try:
        session = Session(files[BYTES], weights, layout.caches, layout.name)
    except (RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        versions = f"compiled by IREE {layout.compiler}, this is {iree.runtime.version.VERSION}"
        raise ManifestError(f"{directory / BYTES} cannot be run ({versions}): {said}") from error
    return Model(session, manifest, layout)


class Model:
    """What ``load`` returns."""

    def __init__(self, session: Session, manifest: Manifest, layout: Layout):
        self.session = session
        self.manifest = manifest
        self.layout = layout

    def __call__(
        self,
        tokens: NDArray[Any],
        lengths: Sequence[int] | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> NDArray[np.float32]:
        """Logits.

        Args:
            tokens: int64 [batch, time], padded on the right.
            lengths: how many of each sequence count; all unless given.
            cache: what came before, of ``new_cache``; the tokens are added to it.

        Returns:
            [batch, time, vocab], or [batch, 1, vocab] of the last rows; rows past a sequence's
            length are unspecified.

        Raises:
            InputError: wrong shapes, lengths or token numbers, or more positions than there are.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            found = f"{tokens.dtype} {[*tokens.shape]}"
            raise InputError(f"tokens must be int64 [batch, time], not {found}")
        batch, time = tokens.shape
        counts = [time] * batch if lengths is None else [int(n) for n in lengths]
        least = 0 if cache is not None else 1
        if len(counts) != batch or not all(min(least, time) <= n <= time for n in counts):
            raise InputError(f"lengths are {counts}: not {batch} numbers of {least} .. {time}")
        below = self.manifest.entries["main"].inputs[0].below
        wrong = (tokens < 0) | (tokens >= (below or 0))
        if wrong.any():
            raise InputError(f"token {tokens[wrong][0]} is not one of 0 .. {(below or 0) - 1}")
        cache = cache or self.new_cache(batch, time)
        if len(cache.lengths) != batch:
            raise InputError(f"the cache holds {len(cache.lengths)} sequences, not {batch}")
        most = max(cache.lengths, default=0) + time
        ends = map(sum, zip(cache.lengths, counts, strict=True))
        check_context(self.manifest, max(ends, default=0))
        if most > cache.capacity:
            raise InputError(f"{most} positions do not fit into a cache of {cache.capacity}")
        return self.session.step(tokens.astype(np.int64), counts, cache, last_only)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache.

        Args:
            capacity: positions per sequence; a step of n padded tokens needs room for n.
        """
        return self.session.new_cache(batch, max(capacity, 1))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        eos: int | Sequence[int] | None = None,
        on_token: Callable[[int, list[int]], None] | None = None,
        *,
        min_p: float = 0.0,
        stop: str | Sequence[Stop] | None = None,
        tokenizer: Tokenizer | None = None,
        prefill_chunk: int | None = None,
    ) -> list[list[int]]:
        """Continue prompts; arguments are those of the PyTorch backend's ``generate``.

        Returns:
            Prompt and continuation of each sequence.
        """
        check_sampling(temperature, top_p, min_p)
        check_prompts(self.manifest, prompts, max_new_tokens)
        if prefill_chunk is not None and prefill_chunk < 1:
            raise InputError(f"prefill_chunk is {prefill_chunk}: it must be at least 1")
        endings = Endings(prompts, eos, stop, tokenizer)
        if prompts and max_new_tokens:
            chunk = prefill_chunk or self._chunk(prompts)
            cache = self.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens + chunk)
            logits = self._prefill(prompts, cache, chunk)
            active = list(range(len(prompts)))
            for step in range(max_new_tokens):
                new = choose(logits[active], active, step, temperature, top_p, seed, min_p).tolist()
                told = [ENDED] * len(prompts)
                for slot, token in zip(active, new, strict=True):
                    told[slot] = token
                active = [s for s, t in zip(active, new, strict=True) if not endings.add(s, t)]
                if on_token:
                    on_token(step, told)
                if not active or step == max_new_tokens - 1:
                    break
                rows = np.array([[max(token, 0)] for token in told])
                counts = [int(slot in active) for slot in range(len(prompts))]
                logits = self.session.step(rows, counts, cache, True)[:, 0]
        return [[*prompt, *endings.kept(n)] for n, prompt in enumerate(prompts)]

    def _chunk(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens of each sequence one step takes."""
        batch, longest = len(prompts), max(map(len, prompts))
        most = PREFILL_TOKENS // batch
        if self.manifest.pairs:
            most = min(most, PREFILL_PAIRS // (self.manifest.pairs * batch * longest))
        return max(min(most, longest), min(FEWEST, longest))

    def _prefill(
        self, prompts: Sequence[Sequence[int]], cache: Cache, chunk: int
    ) -> NDArray[np.float32]:
        """The last rows' logits [batch, vocab]."""
        logits: NDArray[np.float32] | None = None
        while any(len(p) > n for p, n in zip(prompts, cache.lengths, strict=True)):
            parts = [p[n : n + chunk] for p, n in zip(prompts, cache.lengths, strict=True)]
            counts = [len(part) for part in parts]
            tokens = np.zeros((len(parts), max(counts)), np.int64)
            for row, part in zip(tokens, parts, strict=True):
                row[: len(part)] = part
            rows = self.session.step(tokens, counts, cache, True)[:, 0]
            taken = np.array(counts) > 0
            logits = rows if logits is None else np.where(taken[:, None], rows, logits)
        assert logits is not None
        return logits
