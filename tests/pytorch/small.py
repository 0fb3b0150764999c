"""A shipped model at sizes of a few thousand parameters, and checkpoints of it."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import dslc

SIZES = {
    "hidden": 20, "vocab": 51, "layers": 3, "dense": 1, "ffn": 24, "heads": 2, "q_rank": 9,
    "kv_rank": 7, "nope": 5, "rope": 4, "value": 6, "experts": 6, "groups": 2, "open_groups": 1,
    "per_token": 2, "expert_ffn": 8,
}  # fmt: skip

_folder = Path(tempfile.mkdtemp(prefix="dslc-small-"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)


@cache
def compiled() -> Path:
    """The compiled directory; made once per process, so tests leave it alone."""
    dslc.compile("dsv3", set=SIZES).save(_folder / "compiled")
    return _folder / "compiled"


@cache
def model():
    """The model with random weights in float32."""
    return dslc.load(compiled())


def weights() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model().state_dict().items()}


def write(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """A checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int = 3) -> Path:
    """A checkpoint of several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names, index = sorted(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number::shards]
        save_file({n: tensors[n].contiguous() for n in mine}, folder / file)
        index |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text("{}")
    return folder


def prompts(batch: int, time: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES["vocab"], (batch, time), generator=generator)
