"""Measured loads, a placement for them, and a run with it: the same results, less uneven."""

import json

import pytest
import torch
from meshes import MESHES, compiled, prompts
from ranks import launch, once
from test_equal import write

import dslc

NAMES = ("ep2x", "prefill4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return once(tmp_path_factory, "placed", prepared)


def prepared(folder):
    single = dslc.load(compiled(folder, None), seed=5)
    tensors = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name][1::2] += 100.0  # half of the experts get everything
    write(folder / "uneven", tensors)
    for name in NAMES:
        compiled(folder, name)
    launch(folder, *(("placed.rank", name, MESHES[name]) for name in NAMES))


@pytest.fixture(scope="module", params=NAMES)
def ranks(request, folder):
    name = request.param
    return [torch.load(folder / f"{name}.{n}.pt") for n in range(MESHES[name])]


def test_the_same_results(ranks, folder):
    alone = dslc.load(compiled(folder, None), checkpoint=folder / "uneven")
    with torch.no_grad():
        wanted = alone(prompts(5, 9))
    for found in ranks:
        assert float((found["logits"] - wanted).abs().max() / wanted.abs().max()) <= 1e-5
    before, after = (json.loads(ranks[0][when])["tokens"] for when in ("before", "after"))
    assert before == after
    assert all(found["before"] == found["after"] == "" for found in ranks[1:]), "rank 0 prints"


def test_what_is_picked_does_not_depend_on_where_it_is(ranks, request, folder):
    name = request.node.callspec.params["ranks"]
    first, second = (
        json.loads((folder / f"{name}.{w}.json").read_text()) for w in ("loads", "again")
    )
    assert first["loads"] == second["loads"]


def test_the_busiest_rank_is_less_busy(ranks):
    before, after = ([found[f"rows {when}"] for found in ranks] for when in ("before", "after"))
    assert sum(before) == sum(after) > 0
    foretold = json.loads(ranks[0]["balance"])["imbalance"]
    assert max(after) < max(before)
    assert max(after) * len(after) / sum(after) <= 1.1 * max(foretold)


def test_a_placement_that_does_not_fit(ranks):
    for found in ranks:
        assert "places for 8 blocks, each of which lies in one at least" in found["refused"]
