"""A small mixture of experts, compiled for several meshes, run by as many processes as each has."""

from pathlib import Path

import pytest
import torch

import dslc
from backends.pytorch.inputs import InputError
from dslc.program import compile_file

# Odd numbers where the meshes allow them: 4 heads and 8 experts are divided by up to 4.
SIZES = {
    "hidden": 20, "vocab": 52, "layers": 3, "dense": 1, "ffn": 28, "heads": 4, "q_rank": 9,
    "kv_rank": 7, "nope": 5, "rope": 4, "value": 6, "experts": 8, "groups": 4, "open_groups": 2,
    "per_token": 3, "expert_ffn": 12,
}  # fmt: skip

DEPLOYMENTS = """
edition 2026
import dsv3

deploy ep2x of DeepSeekV3 from ep2 { shard MoE.expert -> ep with 4 redundant }
deploy replicated of DeepSeekV3 { mesh ep = 2  shard MoE.expert -> ep }
deploy crossed of DeepSeekV3 {
  mesh dp = 2, ep = 2
  shard batch -> dp, MoE.expert -> (ep, dp), MLA.v -> ep, Dense.f -> ep, MoE.u -> ep, vocab -> ep
}
cluster pairs from h800 { per_node = 2, nodes = 2 }
deploy nodes of DeepSeekV3 from ep4 on pairs { }
deploy whole of DeepSeekV3 { mesh tp = 2  shard hidden -> tp }

deploy turns2 of DeepSeekV3 from ep2 { overlap two_microbatches }
deploy turns4 of DeepSeekV3 from ep4 { overlap two_microbatches }
deploy turns_tp of DeepSeekV3 from tp2ep2 { overlap two_microbatches }
deploy turns_nodes of DeepSeekV3 from nodes on pairs { overlap two_microbatches }
deploy fp8_2 of DeepSeekV3 from fp8 { mesh ep = 2  shard batch -> ep, MoE.expert -> ep }
deploy fp8_turns2 of DeepSeekV3 from fp8_2 { overlap two_microbatches }

# What is published, on fewer ranks and not in FP8: copies and nodes that hold groups, and two
# experts on each of ranks that the experts alone do not divide over.
deploy prefill4 of DeepSeekV3 from prefill on pairs {
  mesh ep = 4  shard MoE.expert -> ep with 4 redundant  precision none
}
cluster trio from h800 { per_node = 2, nodes = 3 }
deploy decode6 of DeepSeekV3 from decode on trio {
  mesh ep = 6  shard MoE.expert -> ep with 4 redundant  precision none
}
"""
MESHES = {"ep2": 2, "ep4": 4, "dp2ep2": 4, "tp2ep2": 4, "dp2tp2ep2": 8, "ep2x": 2,
          "replicated": 2, "crossed": 4, "whole": 2, "nodes": 4, "prefill4": 4, "decode6": 6,
          "turns2": 2, "turns4": 4, "turns_tp": 4, "turns_nodes": 4}  # fmt: skip
CODED = {"fp8_2": 2, "fp8_turns2": 2}  # the one as the other
# Those that get routing so uneven that some ranks get nothing, too.
UNEVEN = ("ep2", "ep4", "dp2ep2", "tp2ep2", "dp2tp2ep2", "ep2x", "nodes", "prefill4", "turns4")


def source(folder: Path) -> Path:
    file = folder / "meshes.arch"
    file.write_text(DEPLOYMENTS)
    return file


def compiled(folder: Path, name: str | None) -> Path:
    """The model compiled for a mesh, or for one process."""
    out = folder / (name or "single")
    if not out.exists():
        compile_file(str(source(folder)), set=SIZES, deploy=name).save(out)
    return out


def prompts(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES["vocab"], (batch, time), generator=generator)


def work(model) -> dict:
    """What a model computes, whether it is one process or several."""
    found = {}
    with torch.no_grad():
        ragged, lengths = prompts(5, 9), torch.tensor([9, 4, 1, 7, 2])
        found["ragged"] = model(ragged, lengths)
        found["one sequence"] = model(prompts(1, 6, seed=1))
        found["future"] = model.mtp(ragged, lengths)
        cache = model.new_cache(3)
        model(prompts(3, 5, seed=2), cache=cache)
        found["second chunk"] = model(
            prompts(3, 3, seed=3), torch.tensor([3, 1, 0]), cache=cache, last_only=True
        )
        cache.truncate([2, 6, 0])
        found["after truncation"] = model(prompts(3, 2, seed=4), cache=cache)
    found["generated"] = model.generate(ragged, lengths, max_new_tokens=4)
    how = {"temperature": 1.5, "top_p": 0.9, "min_p": 0.001, "seed": 11}
    found["drawn"] = list(model.generate(prompts(3, 4, seed=5), max_new_tokens=3, **how))
    return found


def refused(model) -> str:
    """What is said where the logits of one sequence are NaN: at a token that no other has."""
    model.module.embed.data[0] = torch.nan
    tokens = prompts(3, 4, seed=5).clamp(min=1)
    tokens[2, 1] = 0
    with pytest.raises(InputError) as error:
        model.generate(tokens)
    return str(error.value)


def rank(folder: Path, name: str, number: int) -> None:
    """One rank of a mesh: works with both checkpoints, and keeps what it found and sent."""
    from recorded import recorded

    out = {}
    model = dslc.load(folder / name, checkpoint=folder / "even")
    with recorded() as log:
        out["even"] = work(model)
    out["log"], out["traffic"] = log, model.mesh.traffic
    out["bytes read"] = model.bytes_read
    out["held"] = sum(p.nbytes for p in model.module.parameters())
    if name in UNEVEN:
        uneven = dslc.load(folder / name, checkpoint=folder / "uneven")
        out["uneven"] = work(uneven)
        random = dslc.load(folder / name, seed=7)
        out["random"] = {"ragged": random(prompts(5, 9))}
    if name in ("ep2", "crossed"):
        out["refused"] = refused(model)
    torch.save(out, folder / f"{name}.{number}.pt")
