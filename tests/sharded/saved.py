"""Ranks that save their weights, and ranks that load what others have saved."""

import errno
import os
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from meshes import compiled, prompts

import dslc


def saves(folder: Path, name: str, number: int) -> None:
    model = dslc.load(folder / name, seed=5)
    dcp.save(model.state_dict(), checkpoint_id=folder / f"{name}.dcp")
    model.save(folder / f"{name}.saved")
    said = {"held": sum(p.nbytes for p in model.module.state_dict().values())}
    said["again"] = refused(model, folder / f"{name}.saved")
    if number == 0:
        os.posix_fallocate, before = failing, os.posix_fallocate
        said["no room"] = refused(model, folder / f"{name}.full")
        os.posix_fallocate = before
    else:
        said["no room"] = refused(model, folder / f"{name}.full")
    if number == 1:
        os.pwrite, before = failing, os.pwrite
        said["disk full"] = refused(model, folder / f"{name}.full")
        os.pwrite = before
    else:
        said["disk full"] = refused(model, folder / f"{name}.full")
    torch.save(said, folder / f"{name}.{number}.said")


def failing(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def refused(model, folder: Path) -> str:
    try:
        model.save(folder)
    except dslc.UserError as error:
        return str(error)
    raise AssertionError("it was saved")


def loads(folder: Path, name: str, number: int) -> None:
    """What tp2ep2 has saved, in three ways."""
    model = dslc.load(folder / name, seed=9)
    weights = model.state_dict()
    dcp.load(weights, checkpoint_id=folder / "tp2ep2.dcp")
    model.load_state_dict(weights)
    with torch.no_grad():
        found = {"distributed": model(prompts(5, 9))}
        saved = dslc.load(folder / name, checkpoint=folder / "tp2ep2.saved")
        found["saved"] = saved(prompts(5, 9))
        whole = dslc.load(folder / name, seed=9)
        whole.load_state_dict(torch.load(folder / "single.pt"))
        found["whole"] = whole(prompts(5, 9))
    refusals = {}
    for what, given in {
        "shape": {**weights, "model.norm.weight": torch.zeros(3)},
        "missing": {n: t for n, t in weights.items() if n != "model.norm.weight"},
        "unexpected": {**weights, "model.norms": torch.zeros(3)},
    }.items():
        try:
            model.load_state_dict(given)
        except dslc.UserError as error:
            refusals[what] = str(error)
    torch.save((found, refusals), folder / f"{name}.{number}.loaded")


def prepare(folder: Path) -> dict:
    """What one process has."""
    single = dslc.load(compiled(folder, None), seed=5)
    weights = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    torch.save(weights, folder / "single.pt")
    return weights
