"""Several processes give what one gives: every mesh, on real processes, launched once."""

import pytest
import torch
from meshes import CODED, MESHES, SIZES, compiled, work
from ranks import launch, once

import dslc
from backends.pytorch.runtime.routing import Placement
from compiler.balance import unmeasured

ROW = SIZES["hidden"] * 4  # bytes of a token in float32
PICKS = SIZES["per_token"] * 8  # of its picks and gates


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, compiled directories, and what each rank of each mesh found."""
    return once(tmp_path_factory, "sharded", prepared)


def prepared(folder):
    single = dslc.load(compiled(folder, None), seed=5)
    tensors = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    write(folder / "even", tensors)
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name][:4] += 100.0  # the first two groups of experts get everything
    write(folder / "uneven", tensors)
    for name in (*MESHES, *CODED):
        compiled(folder, name)
    launch(folder, *(("meshes.rank", name, count) for name, count in {**MESHES, **CODED}.items()))


def write(folder, tensors):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(
        {n: t.detach().contiguous() for n, t in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text("{}")


@pytest.fixture(scope="module")
def alone(folder):
    """What one process computes."""
    directory = compiled(folder, None)
    found = {k: work(dslc.load(directory, checkpoint=folder / k)) for k in ("even", "uneven")}
    from meshes import prompts

    with torch.no_grad():
        found["random"] = {"ragged": dslc.load(directory, seed=7)(prompts(5, 9))}
    return found


@pytest.fixture(scope="module", params=MESHES)
def ranks(request, folder):
    """What each rank of a mesh found."""
    paths = [folder / f"{request.param}.{n}.pt" for n in range(MESHES[request.param])]
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.mark.parametrize("weights", ["even", "uneven", "random"])
def test_every_rank_has_the_results_of_one_process(ranks, alone, weights):
    if weights not in ranks[0]:
        pytest.skip("other meshes have these weights")
    for found in ranks:
        for what, wanted in alone[weights].items():
            if what in ("generated", "drawn"):
                assert all(map(torch.equal, found[weights][what], wanted)), what
                continue
            error = (found[weights][what] - wanted).abs().max() / wanted.abs().max()
            assert error <= 1e-5, (what, float(error))


def test_every_rank_refuses_logits_that_are_not_numbers(folder):
    """A rank chooses for its own sequences; what it finds there all ranks say."""
    for name in ("ep2", "crossed"):
        for number in range(MESHES[name]):
            said = torch.load(folder / f"{name}.{number}.pt", weights_only=False)["refused"]
            assert said.startswith("the logits of sequence 2 are NaN after 0 new tokens"), said


def test_ranks_send_what_the_recorded_routing_implies(request, ranks, folder):
    """A token goes once to each rank that has a block that it picked, and one row comes back."""
    name = request.node.callspec.params["ranks"]
    if name not in ("ep2", "ep4", "ep2x"):
        pytest.skip("counted on meshes of one axis")
    each = (SIZES["experts"] + (4 if name == "ep2x" else 0)) // len(ranks)
    go = torch.zeros(len(ranks), len(ranks), dtype=torch.int64)  # rows from a rank to another
    calls = {len(found["log"]) for found in ranks}
    assert len(calls) == 1, "ranks route in step, whether they have tokens or not"
    for sender, found in enumerate(ranks):
        for _, pick in found["log"]:
            if name == "ep2x":
                pick = Placement.of(unmeasured(8, 12, 1, 2), 8).spread(pick, sender)
            for token in pick.tolist():
                for receiver in {place // each for place in token}:
                    go[sender, receiver] += 1
    for number, found in enumerate(ranks):
        away = int(go[number].sum() - go[number, number])
        back = int(go[:, number].sum() - go[number, number])
        traffic = found["traffic"]
        assert traffic["dispatch"] == away * ROW
        assert traffic["picks"] == away * PICKS
        assert traffic["combine"] == back * ROW
        assert traffic["counts"] == calls.copy().pop() * 8 * (len(ranks) - 1)


def test_two_micro_batches_give_what_one_gives_in_fp8(folder):
    """What is in flight are codes: the same ones, so that results differ by sums' order alone."""
    for number in range(2):
        one, two = (
            torch.load(folder / f"{name}.{number}.pt", weights_only=False) for name in CODED
        )
        for what, wanted in one["even"].items():
            found = two["even"][what]
            if what in ("generated", "drawn"):
                assert all(map(torch.equal, found, wanted))
                continue
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), what


@pytest.mark.parametrize(
    ("one", "two"), [("nodes", "turns_nodes"), ("ep2", "turns2"), tuple(CODED)]
)
def test_micro_batches_send_the_same_rows_in_more_transfers(folder, one, two):
    for number in range({**MESHES, **CODED}[one]):
        before, after = (
            torch.load(folder / f"{name}.{number}.pt", weights_only=False)["traffic"]
            for name in (one, two)
        )
        assert after["counts"] > before["counts"]
        for what in ("dispatch", "combine", "picks"):
            assert after[what] == before[what]


@pytest.mark.parametrize("name", ["nodes", "prefill4"])
def test_a_token_goes_to_a_node_once_and_is_forwarded_inside(folder, name):
    ranks = [torch.load(folder / f"{name}.{n}.pt", weights_only=False) for n in range(4)]
    places = 12 if name == "prefill4" else 8  # copies lie on their blocks' node
    each, placement = places // 4, Placement.of(unmeasured(8, places, 2, 4), 8)
    between = within = direct = 0
    for sender, found in enumerate(ranks):
        for _, pick in found["log"]:
            for picked, token in zip(pick, placement.spread(pick, sender), strict=True):
                receivers = {place // each for place in token.tolist()}
                assert {r // 2 for r in receivers} == {block // 4 for block in picked.tolist()}
                direct += len(receivers - {sender})
                between += len({r // 2 for r in receivers} - {sender // 2})
                within += sum(r % 2 != sender % 2 for r in receivers)
    sent = sum(found["traffic"]["dispatch"] for found in ranks)
    assert sent == (between + within) * ROW
    assert between < direct


def test_copies_share_the_work_of_a_block_evenly():
    placement = Placement.of([0, 1, 2, 0, 1, 0], 3)
    pick = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1], [0, 2], [0, 1]])
    places = placement.spread(pick, 0)
    assert placement.numbers[places].equal(pick)
    assert torch.bincount(places.flatten(), minlength=6).tolist() == [2, 2, 2, 2, 2, 2]
    assert placement.spread(pick, 1)[0, 0] == 3  # another rank begins with another copy


def test_a_rank_reads_its_own_slices_and_nothing_else(ranks, folder, request):
    name = request.node.callspec.params["ranks"]
    if name not in ("ep2", "ep4", "tp2ep2"):
        pytest.skip("counted where it is plain what a rank has")
    from backends.pytorch.weights.tensorfile import read_header

    stored = read_header(folder / "even" / "model.safetensors")
    experts = sum(s.size for n, s in stored.items() if ".experts." in n)
    rest = sum(s.size for s in stored.values()) - experts
    for found in ranks:
        if name == "tp2ep2":  # two ranks along each axis, and most of the rest is divided by tp
            assert found["bytes read"] < experts // 4 + rest
            assert found["bytes read"] >= experts // 4 + rest // 2
        else:
            assert found["bytes read"] == experts // len(ranks) + rest
