"""A world of one, through real process groups: gloo on CPUs, NCCL wherever there is a GPU."""

import pytest
import torch
from alone import compile_all, on_cpu, rank
from meshes import prompts, work
from ranks import launch, once

import dslc

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU: none is here")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=GPU)])
def found(request, tmp_path_factory):
    device = request.param

    def prepared(folder):
        compile_all(folder)
        launch(folder, (f"alone.{rank.__name__}", device, 1))

    folder = once(tmp_path_factory, f"alone-{device}", prepared)
    return folder, device, torch.load(folder / f"{device}.pt")


def test_it_is_what_one_process_computes(found):
    folder, device, got = found
    assert got["backend"] == {"cpu": "gloo", "cuda": "nccl"}[device]
    alone = on_cpu(work(dslc.load(folder / "single", seed=5, device=device)))
    for what, wanted in alone.items():
        if what in ("generated", "drawn"):
            assert all(map(torch.equal, got["work"][what], wanted))
        else:
            assert float((got["work"][what] - wanted).abs().max() / wanted.abs().max()) <= 1e-5
    coded = dslc.load(folder / "coded_single", seed=5, device=device)
    with torch.no_grad():
        wanted = coded(prompts(3, 5)).cpu()
    assert float((got["coded"] - wanted).abs().max() / wanted.abs().max()) <= 1e-3


def test_what_a_mesh_does(found):
    _, _, got = found
    x = torch.arange(12.0).view(3, 4)
    for what, value in got["together"].items():
        assert value.equal(x[:0] if what == "none" else x), what
