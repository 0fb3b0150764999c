"""Weights saved by one mesh are loaded by another, by one process, and by whoever reads
safetensors; no rank writes more than its own."""

import json
from collections import Counter

import pytest
import torch
import torch.distributed.checkpoint as dcp
from meshes import MESHES, compiled, prompts
from ranks import launch, once
from safetensors.torch import load_file
from saved import prepare

import dslc

SAVERS = ("tp2ep2", "ep2x", "whole")
LOADERS = ("ep4", "crossed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return once(tmp_path_factory, "saved", prepared)


def prepared(folder):
    prepare(folder)
    for name in (*SAVERS, *LOADERS):
        compiled(folder, name)
    launch(
        folder,
        *(("saved.saves", name, MESHES[name]) for name in SAVERS),
        *(("saved.loads", name, MESHES[name]) for name in LOADERS),
    )


@pytest.fixture(scope="module")
def weights(folder):
    return torch.load(folder / "single.pt")


@pytest.mark.parametrize("name", SAVERS)
def test_what_ranks_save_is_a_hugging_face_checkpoint(folder, weights, name):
    saved = load_file(folder / f"{name}.saved" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for tensor, wanted in weights.items():
        assert saved[tensor].equal(wanted), tensor


@pytest.mark.parametrize("name", SAVERS)
def test_torch_distributed_checkpoint_loads_it_in_one_process(folder, weights, name):
    model = dslc.load(compiled(folder, None), seed=9)
    found = model.state_dict()
    dcp.load(found, checkpoint_id=folder / f"{name}.dcp", no_dist=True)
    model.load_state_dict(found)
    for tensor, wanted in weights.items():
        assert model.state_dict()[tensor].equal(wanted), tensor


@pytest.mark.parametrize("how", ["distributed", "saved", "whole"])
@pytest.mark.parametrize("name", LOADERS)
def test_another_mesh_loads_it(folder, name, how):
    with torch.no_grad():
        wanted = dslc.load(compiled(folder, None), seed=5)(prompts(5, 9))
    for number in range(MESHES[name]):
        found, _ = torch.load(folder / f"{name}.{number}.loaded")
        error = (found[how] - wanted).abs().max() / wanted.abs().max()
        assert float(error) <= 1e-5


def test_a_rank_writes_its_own_and_no_more(folder, weights):
    """Files of torch.distributed.checkpoint are a rank's: each begins with the rank's number."""
    for name in SAVERS:
        written = Counter()
        about = dcp.FileSystemReader(folder / f"{name}.dcp").read_metadata()
        for index, place in about.storage_data.items():
            chunks = about.state_dict_metadata[index.fqn].chunks
            (chunk,) = (c for c in chunks if c.offsets == index.offset)
            written[place.relative_path] += 4 * chunk.sizes.numel()
        assert sum(written.values()) == sum(t.nbytes for t in weights.values()), "each part once"
        for number in range(MESHES[name]):
            held = torch.load(folder / f"{name}.{number}.said")["held"]
            assert 0 < written[f"__{number}_0.distcp"] <= held


def test_what_cannot_be_saved_leaves_nothing_behind(folder):
    for number in range(MESHES["tp2ep2"]):
        said = torch.load(folder / f"tp2ep2.{number}.said")
        assert said["again"] == f"{folder / 'tp2ep2.saved'} is there already"
        full = f"{folder / 'tp2ep2.full'} cannot be written: No space left on device"
        assert said["no room"] == full
        assert said["disk full"] == f"{full} (rank 1)"
    assert not [p for p in folder.iterdir() if "full" in p.name]


def test_a_state_dict_that_does_not_fit(folder):
    _, refusals = torch.load(folder / "ep4.0.loaded")
    first = "the state dict does not fit:"
    assert refusals["shape"].startswith(first) and "found [3]" in refusals["shape"]
    assert "model.norm.weight" in refusals["missing"] and "missing" in refusals["missing"]
    assert "model.norms" in refusals["unexpected"]


def test_one_process_saves_too(folder, weights, tmp_path, monkeypatch):
    from backends.pytorch.weights import saving

    monkeypatch.setattr(saving, "FILE_BYTES", 20_000)  # several files
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "config.json").write_text('{"eos_token_id": 3}')
    model = dslc.load(compiled(folder, None), seed=5)
    model.save(tmp_path / "after", checkpoint=tmp_path / "before")
    assert json.loads((tmp_path / "after" / "config.json").read_text()) == {"eos_token_id": 3}
    again = dslc.load(compiled(folder, None), checkpoint=tmp_path / "after").state_dict()
    assert again.keys() == weights.keys()
    assert all(again[name].equal(wanted) for name, wanted in weights.items())
