"""From recorded loads to a placement and a run with it, by the command, in the ranks of a mesh."""

import contextlib
import io
import json
from pathlib import Path

import torch
import torch.distributed as dist
from meshes import prompts

import dslc
from dslc import cli
from dslc.loads import read_placement

RUN = ["--tokens", "1,2,3,4,5", "--tokens", "7,8", "--tokens", "9,10,11", "--max-new-tokens", "4"]


def said(*arguments: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.run([str(a) for a in arguments]) == 0
    return out.getvalue()


def rows_run(model) -> int:
    """How many rows this rank's blocks are given in a step of all prompts."""
    rows, hooks = [], []
    for layer in model.module.layers:
        for block in getattr(layer.mlp, "expert", ()):
            hook = block.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
            hooks.append(hook)
    with torch.no_grad():
        model(prompts(16, 24))
    for hook in hooks:
        hook.remove()
    return sum(rows)


def rank(folder: Path, name: str, number: int) -> None:
    loads, places = folder / f"{name}.loads.json", folder / f"{name}.places.json"
    run = ["run", folder / name, "--checkpoint", folder / "uneven", *RUN, "--json"]
    found = {"before": said(*run, "--record-loads", loads)}
    dist.barrier()
    if number == 0:
        found["balance"] = said("balance", loads, "--deploy", name, "-o", places, "--json")
    dist.barrier()
    again = folder / f"{name}.again.json"
    found["after"] = said(*run, "--placement", places, "--record-loads", again)
    plain = dslc.load(folder / name, checkpoint=folder / "uneven")
    found["rows before"] = rows_run(plain)
    model = dslc.load(
        folder / name, checkpoint=folder / "uneven", placements=read_placement(places)
    )
    found["rows after"] = rows_run(model)
    with torch.no_grad():
        found["logits"] = model(prompts(5, 9))
    wrong = json.loads(places.read_text())
    wrong["phy2log"][0][-1] = wrong["phy2log"][0][0]
    wrong["phy2log"][0].append(0)
    try:
        dslc.load(
            folder / name, placements=dict(zip(wrong["arrays"], wrong["phy2log"], strict=True))
        )
    except dslc.UserError as error:
        found["refused"] = str(error)
    torch.save(found, folder / f"{name}.{number}.pt")
