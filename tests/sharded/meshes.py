"""A small mixture of experts, compiled for several meshes, run by as many processes as each has.

One process imports torch and forks the ranks of one mesh after the other, so that many meshes cost
little more than one. They meet through a store on a free port, as torchrun's workers do.

    python tests/sharded/meshes.py FOLDER NAME...      # runs `work` in the ranks of these meshes
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch

import dslc
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
deploy coded2 of DeepSeekV3 from fp8 { mesh ep = 2  shard batch -> ep, MoE.expert -> ep }
deploy coded2_turns of DeepSeekV3 from coded2 { overlap two_microbatches }
"""
MESHES = {
    "ep2": 2,
    "ep4": 4,
    "dp2ep2": 4,
    "tp2ep2": 4,
    "dp2tp2ep2": 8,
    "ep2x": 2,
    "replicated": 2,
    "crossed": 4,
    "whole": 2,
    "nodes": 4,
    "turns2": 2,
    "turns4": 4,
    "turns_tp": 4,
    "turns_nodes": 4,
}  # as one process, in float32
CODED = {"coded2": 2, "coded2_turns": 2}  # in FP8: the one as the other
ALL = MESHES | CODED  # fmt: skip


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
    return found


def rank(folder: Path, name: str, number: int, checkpoint: Path) -> None:
    """One rank of a mesh: works with both checkpoints, and keeps what it found and sent."""
    from recorded import recorded

    out = {}
    model = dslc.load(folder / name, checkpoint=checkpoint / "even")
    with recorded() as log:
        out["even"] = work(model)
    out["log"], out["traffic"] = log, model.mesh.traffic
    out["bytes read"] = model.bytes_read
    out["held"] = sum(p.nbytes for p in model.module.parameters())
    uneven = dslc.load(folder / name, checkpoint=checkpoint / "uneven")
    out["uneven"] = work(uneven)
    random = dslc.load(folder / name, seed=7)
    out["random"] = {"ragged": random(prompts(5, 9))}
    torch.save(out, folder / f"{name}.{number}.pt")


def run(folder: Path, name: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number in range(ALL[name]):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        status = 1
        try:
            os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "MASTER_PORT": str(port),
                           "WORLD_SIZE": str(ALL[name]), "MASTER_ADDR": "127.0.0.1",
                           "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
            rank(folder, name, number, folder)
            status = 0
        except BaseException:
            (folder / f"{name}.failed").write_text(traceback.format_exc())
            traceback.print_exc()
        finally:
            os._exit(status)
    failed = [n for n, p in enumerate(processes) if os.waitpid(p, 0)[1]]
    if failed:
        sys.exit(f"{name}: ranks {failed} failed")


if __name__ == "__main__":
    for mesh in sys.argv[2:]:
        run(Path(sys.argv[1]), mesh)
    print(json.dumps(sys.argv[2:]))
