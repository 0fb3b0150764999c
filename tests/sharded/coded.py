"""The small mixture of experts with its products in FP8, on one process and on several.

Both are fed the same: recorded inputs in the place of those that a layer, or the experts of one,
would get.
"""

from pathlib import Path

import torch
from meshes import SIZES, prompts
from recorded import recorded

import dslc
from dslc.program import compile_file

TILE = 16
# No dim is a multiple of a tile; some are longer than one.
DIMS = {**SIZES, "hidden": 36, "expert_ffn": 20, "ffn": 28, "kv_rank": 18}
DEPLOYMENTS = f"""
edition 2026
import dsv3

deploy coded1 of DeepSeekV3 {{
  precision fp8(e4m3, activations = 1 x {TILE}, weights = {TILE} x {TILE})
            for contractions with a parameter, except embed, head, centroid, W_eh
}}
deploy coded2 of DeepSeekV3 from coded1 {{ mesh ep = 2  shard batch -> ep, MoE.expert -> ep }}
deploy coded4 of DeepSeekV3 from coded2 {{ mesh ep = 4 }}
cluster pairs from h800 {{ per_node = 2, nodes = 2 }}
deploy coded_nodes of DeepSeekV3 from coded4 on pairs {{ }}
deploy coded_copies of DeepSeekV3 from coded_nodes {{
  shard MoE.expert -> ep with 4 redundant
}}
"""
MESHES = {"coded2": 2, "coded4": 4, "coded_nodes": 4, "coded_copies": 4}
LENGTHS = [9, 4, 1, 7, 2]


def compiled(folder: Path) -> None:
    file = folder / "coded.arch"
    file.write_text(DEPLOYMENTS)
    for name in ("coded1", *MESHES):
        compile_file(str(file), set=DIMS, deploy=name).save(folder / name)


def found(model, layers=None, experts=None) -> dict:
    """What layers and experts of a model are given and give.

    Args:
        layers: by number, what each layer is given in the place of its input, [tokens, hidden].
        experts: by number, what each layer's mixture of experts is given.
    """
    out: dict = {"given": {}, "layer": {}, "mixture": {}, "codes": {}}
    hooks = []
    for number, layer in enumerate(model.module.layers):

        def feed(_, args, number=number):
            fed = layers[number].clone() if layers is not None else args[1]
            out["given"][number] = fed
            return args[0], fed, *args[2:]

        def keep(_, args, result, number=number):
            out["layer"][number] = result

        hooks += [layer.register_forward_pre_hook(feed), layer.register_forward_hook(keep)]
        if hasattr(layer.mlp, "expert"):

            def mix(_, args, number=number):
                fed = experts[number].clone() if experts is not None else args[0]
                out["mixture"][number] = fed
                return (fed, *args[1:])

            hooks.append(layer.mlp.register_forward_pre_hook(mix))
            for place, block in enumerate(layer.mlp.expert):

                def take(_, args, at=(number, place)):
                    if len(args[0].codes):
                        bytes_of = args[0].codes.view(torch.uint8), args[0].scales
                        out["codes"].setdefault(at, []).append(bytes_of)

                hooks.append(block.register_forward_pre_hook(take))
    tokens, lengths = prompts(len(LENGTHS), max(LENGTHS)), torch.tensor(LENGTHS)
    with torch.no_grad(), recorded() as log:
        model(tokens, lengths)
    out["log"] = log
    for hook in hooks:
        hook.remove()
    return out


def own(tokens: dict, model) -> dict:
    """The rows of a rank's own sequences, which are contiguous."""
    mesh, batch = model.mesh, model.manifest.batch
    at, ways = mesh.index(*batch), mesh.ways(*batch)
    first, last = (sum(LENGTHS[: len(LENGTHS) * i // ways]) for i in (at, at + 1))
    return {number: rows[first:last] for number, rows in tokens.items()}


def numbered(codes: dict, model, at: int) -> dict:
    """By the number of an expert in the whole array, not by its place on a rank."""
    each, held = len(model.module.layers[1].mlp.expert), model.mesh.placements
    numbers = {path: placement.numbers.tolist() for path, placement in held.items()}
    out = {}
    for (n, place), c in codes.items():
        there = numbers.get(f"layers.{n}.mlp.expert", range(DIMS["experts"]))
        out[n, there[at * each + place]] = out.get((n, there[at * each + place]), []) + c
    return out


def rank(folder: Path, name: str, number: int) -> None:
    reference = torch.load(folder / "reference.pt", weights_only=False)
    model = dslc.load(folder / name, seed=5)
    fed = found(model, layers=own(reference["given"], model))
    mixed = found(model, experts=own(reference["mixture"], model))
    before = dict(model.mesh.traffic)
    model(prompts(2, 3))
    torch.save(
        {
            "layer": fed["layer"],
            "given": fed["given"],
            "picks": fed["log"],
            "codes": numbered(mixed["codes"], model, number),
            "traffic": before,
            "log": fed["log"] + mixed["log"],
        },
        folder / f"{name}.{number}.pt",
    )
