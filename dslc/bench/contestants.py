"""What a contestant is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Setup:
    """What is timed: a compiled directory, a checkpoint, and how.

    Attributes:
        vocab: how many tokens there are.
        new: tokens that are decoded after the prompt.
        scratch: a folder for files that a contestant makes.
    """

    directory: Path
    checkpoint: Path | None
    dtype: str
    threads: int
    vocab: int
    prompt: int
    new: int
    scratch: Path


@dataclass(frozen=True)
class Round:
    """One turn: seconds until the first token, seconds for the others, and all of them."""

    prefill: float
    decode: float
    tokens: list[int]


class Contestant(Protocol):
    """A model that is loaded.

    Attributes:
        about: version and settings, in a few words.
    """

    about: str

    def round(self, prompt: Sequence[int], new: int) -> Round:
        """Prefill a prompt and decode greedily, ``new`` tokens in all."""


class Absent(Exception):
    """A contestant that cannot take part here, and why, in a few words."""


def maker(name: str) -> Callable[[Setup], Contestant]:
    """What makes a contestant, imported in its own process only."""
    if name == "dslc":
        from dslc.bench.ours import Ours

        return Ours
    if name == "mlir":
        from dslc.bench.with_mlir import WithMlir

        return WithMlir
    if name == "pytorch":
        from dslc.bench.with_mlir import with_pytorch

        return with_pytorch
    if name == "transformers":
        from dslc.bench.with_transformers import WithTransformers

        return WithTransformers
    if name == "llama.cpp":
        from dslc.bench.with_llama_cpp import WithLlamaCpp

        return WithLlamaCpp
    raise ValueError(f"no contestant {name}")


PEERS = ("transformers", "llama.cpp")
