"""Small random checkpoints of other model families, written by transformers, and what holds a
shipped model to them.

A test module names its family and cases, and imports the tests:

    from oracle.families import Case, Family
    from oracle.feeding import *

    FAMILY = Family("llama3", LlamaConfig, {"hidden_size": 42, ...})
    CASES = {"plain": {}, "tied": {"tie_word_embeddings": True}}
    case = FAMILY.fixture(CASES)
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from oracle.reference import Reference

# Primes wherever an architecture allows one; what each family adds stands in its test module.
SMALL = {
    "vocab_size": 97,
    "intermediate_size": 31,
    "num_hidden_layers": 3,
    "max_position_embeddings": 640,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Family:
    """A shipped model, or a file, and transformers' configuration of that family.

    `newer`: keys of config.json that transformers 5 writes and the published files do not have.
    """

    file: str
    config: type[PreTrainedConfig]
    small: Mapping[str, object]
    newer: tuple[str, ...] = ()

    def write(
        self,
        path: Path,
        *,
        form: str = "published",
        seed: int = 0,
        sharded: bool = False,
        dtype: torch.dtype = torch.float32,
        constant_routing: bool = False,
        **config: object,
    ) -> Path:
        """Write a checkpoint; `config` overrides the small sizes, by config.json key. A key that is
        `...` is left to the family's default, and in the published form left out of the file.

        form: "published", with rope_theta and rope_scaling at the top of config.json, or "v5", with
            rope_parameters.
        constant_routing: routers so decided that every token goes to the same experts, whatever
            the rounding.
        """
        settings = {**SMALL, **self.small, **config}
        given = {k: v for k, v in settings.items() if v is not ...}
        model = AutoModelForCausalLM.from_config(self.config(**given))
        _randomise(model, torch.Generator().manual_seed(seed), constant_routing)
        model.to(dtype).save_pretrained(path, max_shard_size="16KB" if sharded else "50GB")
        left_out = (*self.newer, *(k for k, v in settings.items() if v is ...))
        _write_config(path / "config.json", form, left_out)
        return path

    def fixture(self, cases: Mapping[str, Mapping]):
        """A fixture `case` that goes through the cases, each made once."""

        @pytest.fixture(scope="module", params=cases, name="case")
        def case(request, tmp_path_factory):
            folder = tmp_path_factory.mktemp(f"{Path(self.file).stem}-{request.param}")
            seed = sorted(cases).index(request.param)
            yield Case(self, folder, {"seed": seed, **cases[request.param]})
            shutil.rmtree(folder, ignore_errors=True)

        return case


class Case:
    """A checkpoint, what transformers makes of it, and our program for it."""

    def __init__(self, family: Family, folder: Path, bent: Mapping):
        self.family, self.folder, self.seed = family, folder, int(bent["seed"])
        self.checkpoint = family.write(folder / "checkpoint", **bent)

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.checkpoint)

    @cached_property
    def compiled(self) -> Path:
        import dslc

        dslc.compile(self.family.file, checkpoint=str(self.checkpoint)).save(
            str(self.folder / "compiled")
        )
        return self.folder / "compiled"

    @cached_property
    def model(self):
        import dslc

        return dslc.load(str(self.compiled), checkpoint=str(self.checkpoint), dtype="float32")

    def prompts(self, *lengths: int) -> list[Tensor]:
        """Random sequences, the same for the same case and lengths."""
        generator = torch.Generator().manual_seed(1 + self.seed)
        vocab = self.reference.model.config.vocab_size
        return [torch.randint(vocab, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator, constant_routing: bool) -> None:
    """Values of order one everywhere: matrices keep the scale of their input, gains scatter around
    what they are made as (one, or zero where a norm adds one), biases around zero."""
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor.copy_(tensor.mean().round() + 0.2 * noise)
        elif name.endswith("bias"):
            tensor.copy_(0.5 * noise)
        elif name.endswith("embed_tokens.weight"):
            tensor.copy_(noise)
            if constant_routing:
                tensor[:, 0] = 10  # routers read this channel, nearly the same for all tokens
        elif not (tied and name.endswith("lm_head.weight")):
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)
            if constant_routing and name.endswith(".gate.weight"):
                tensor.mul_(0.1)
                tensor[:, 0] = torch.randperm(len(tensor), generator=generator) / 3


def _write_config(file: Path, form: str, left_out: tuple[str, ...]) -> None:
    if form == "v5":
        return
    if form != "published":
        raise ValueError(f"form is 'published' or 'v5', not {form!r}")
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
    kept = {k: v for k, v in config.items() if k not in left_out}
    file.write_text(json.dumps(kept, indent=2))
