"""FP8 between ranks: what is sent is byte for byte what one process computes."""

import pytest
import torch
from coded import DIMS, MESHES, TILE, compiled, found
from ranks import launch, once

import dslc


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return once(tmp_path_factory, "coded", prepared)


def prepared(folder):
    compiled(folder)
    torch.save(found(dslc.load(folder / "coded1", seed=5)), folder / "reference.pt")
    launch(folder, *(("coded.rank", name, count) for name, count in MESHES.items()))


@pytest.fixture(scope="module")
def reference(folder):
    return torch.load(folder / "reference.pt", weights_only=False)


@pytest.fixture(scope="module", params=MESHES)
def ranks(request, folder):
    paths = [folder / f"{request.param}.{n}.pt" for n in range(MESHES[request.param])]
    return [torch.load(path, weights_only=False) for path in paths]


def test_experts_get_the_bytes_that_they_get_in_one_process(ranks, reference):
    """For the same input: codes and scales of every token of every expert, copies put together."""
    found = {}
    for one in ranks:
        for path, parts in one["codes"].items():
            found.setdefault(path, []).extend(parts)
    assert found.keys() == reference["codes"].keys()
    assert found
    for path, parts in reference["codes"].items():
        for i, what in enumerate(("codes", "scales")):
            wanted = torch.cat([part[i] for part in parts])
            there = torch.cat([part[i] for part in found[path]])
            assert wanted.dtype == (torch.uint8, torch.float32)[i]
            assert in_order(there).equal(in_order(wanted)), (path, what)


def in_order(rows):
    """Rows sorted: copies of an expert get some of its tokens each."""
    return torch.tensor(sorted(rows.tolist()))


def test_tokens_arrive_in_the_order_of_one_process(folder, reference):
    """Where an expert has one copy and tokens take one hop."""
    for name in ("coded2", "coded4"):
        for number in range(MESHES[name]):
            one = torch.load(folder / f"{name}.{number}.pt", weights_only=False)
            for path, parts in one["codes"].items():
                for (codes, scales), wanted in zip(parts, reference["codes"][path], strict=True):
                    assert codes.equal(wanted[0]) and scales.equal(wanted[1]), path


def test_each_layer_fed_what_one_process_was_fed(ranks, reference):
    for number, wanted in reference["layer"].items():
        out = torch.cat([one["layer"][number] for one in ranks])
        given = torch.cat([one["given"][number] for one in ranks])
        assert given.equal(reference["given"][number])
        change = wanted - given  # without what is carried past
        assert float((out - given - change).norm() / change.norm()) <= 5e-3, number
    picks = [torch.cat([one["picks"][i][1] for one in ranks]) for i in range(len(reference["log"]))]
    for (path, wanted), pick in zip(reference["log"], picks, strict=True):
        assert pick.equal(wanted), path


def test_a_byte_for_each_number_and_a_scale_for_each_tile(request, ranks):
    name = request.node.callspec.params["ranks"]
    if name not in ("coded2", "coded4"):
        pytest.skip("counted on meshes of one hop, without copies")
    each = DIMS["experts"] // len(ranks)
    row = DIMS["hidden"] + 4 * -(-DIMS["hidden"] // TILE)
    for sender, one in enumerate(ranks):
        away = 0
        for _, pick in one["log"]:
            for token in pick.tolist():
                away += len({place // each for place in token} - {sender})
        assert one["traffic"]["dispatch"] == away * row
