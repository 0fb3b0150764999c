"""Other models, odd meshes: every rank has what one process computes."""

import pytest
import torch
from ranks import launch, once
from zoo import DEPLOYMENTS, compiled, work

import dslc


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return once(tmp_path_factory, "zoo", prepared)


def prepared(folder):
    compiled(folder)
    launch(folder, *(("zoo.rank", name, ranks) for name, (_, ranks, _) in DEPLOYMENTS.items()))


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_rank_has_the_results_of_one_process(folder, name):
    model, count, _ = DEPLOYMENTS[name]
    wanted = work(dslc.load(folder / model, seed=4))
    for number in range(count):
        found = torch.load(folder / f"{name}.{number}.pt")
        for what, value in wanted.items():
            if what == "generated":
                assert all(map(torch.equal, found[what], value)), what
            else:
                assert float((found[what] - value).abs().max() / value.abs().max()) <= 1e-5, what
