"""A mesh of one rank, whose groups are real: NCCL does what they do where there is a GPU."""

from pathlib import Path

import torch
import torch.distributed as dist
from meshes import SIZES, prompts, work

import dslc

DEPLOYMENTS = """
edition 2026
import dsv3

deploy alone of DeepSeekV3 {
  mesh      ep = 1, tp = 1
  shard     batch -> ep, MoE.expert -> ep, MLA.h -> tp, Dense.f -> tp, vocab -> tp
}
deploy alone_coded of DeepSeekV3 from alone {
  mesh      ep = 1
  shard     MLA.h -> (), Dense.f -> (), vocab -> ()
  precision fp8(e4m3, activations = 1 x 16, weights = 16 x 16)
            for contractions with a parameter, except embed, head, centroid, W_eh
}
deploy coded_single of DeepSeekV3 {
  precision fp8(e4m3, activations = 1 x 16, weights = 16 x 16)
            for contractions with a parameter, except embed, head, centroid, W_eh
}
"""


def compile_all(folder: Path) -> None:
    (folder / "alone.arch").write_text(DEPLOYMENTS)
    for name in ("alone", "alone_coded", "coded_single", None):
        program = dslc.compile(folder / "alone.arch", set=SIZES, deploy=name)
        program.save(folder / (name or "single"))


def rank(folder: Path, device: str, number: int) -> None:
    model = dslc.load(folder / "alone", seed=5, device=device)
    found = {"backend": dist.get_backend(), "work": on_cpu(work(model))}
    coded = dslc.load(folder / "alone_coded", seed=5, device=device)
    with torch.no_grad():
        found["coded"] = coded(prompts(3, 5)).cpu()
        found["together"] = {k: v.cpu() for k, v in together(model.mesh, device).items()}
    torch.save(found, folder / f"{device}.pt")


def on_cpu(found: dict) -> dict:
    return {k: [t.cpu() for t in v] if isinstance(v, list) else v.cpu() for k, v in found.items()}


def together(mesh, device: str) -> dict:
    """What a mesh does, each through its group."""
    x = torch.arange(12.0, device=device).view(3, 4)
    group = mesh.group("ep")
    assert group.handle is not None
    codes = x.to(torch.float8_e4m3fn)
    return {
        "sum": mesh.all_reduce(x, "ep"),
        "max": mesh.all_reduce(x, "ep", fn="max"),
        "gathered": mesh.all_gather(x, 1, "ep"),
        "scattered": mesh.reduce_scatter(x, 0, "ep"),
        "sent": group.all_to_all(x, [3], [3]),
        "codes": group.all_to_all(codes, [3], [3]).float(),
        "none": group.all_to_all(x[:0], [0], [0]),
    }
