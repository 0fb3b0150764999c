"""A rank reads its own slices and no other byte, and has memory for those alone."""

import json
import re
import shutil
import sys

import pytest
from meshes import SIZES
from ranks import HERE, launch, once
from reading import flipped

import dslc
from dslc import cli

# 24 experts of 1.6 MB in each of 4 layers (one for MTP) make 151 MB; the rest is a few MB.
LARGE = {
    "hidden": 256, "vocab": 512, "layers": 4, "dense": 1, "ffn": 512, "heads": 4, "q_rank": 64,
    "kv_rank": 64, "nope": 32, "rope": 16, "value": 32, "experts": 24, "groups": 4,
    "open_groups": 2, "per_token": 3, "expert_ffn": 512,
}  # fmt: skip

BLOCK = "model.layers.1.mlp.experts.5.up_proj.weight"
EVERYONE = "model.layers.2.self_attn.q_a_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return once(tmp_path_factory, "reading", prepared)


def prepared(folder):
    for name, sizes in (("checkpoint", LARGE), ("small-checkpoint", SIZES)):
        settings = [f"--set={key}={value}" for key, value in sizes.items()]
        assert cli.run(["init", str(folder / name), "dsv3", *settings, "--dtype=float32"]) == 0
    dslc.compile("dsv3", set=LARGE, deploy="ep4").save(folder / "large")
    dslc.compile("dsv3", set=SIZES, deploy="ep4").save(folder / "small")
    dslc.compile("dsv3", set=SIZES, deploy="tp2ep2").save(folder / "small_tp2ep2")
    small = folder / "small-checkpoint"
    shutil.copytree(small, folder / "copy")
    flipped(small, BLOCK, folder / "block")
    flipped(small, EVERYONE, folder / "everyone")
    launch(
        folder,
        ("reading.rank", "large", 4),
        ("reading.copies", "small", 4),
        ("reading.copies", "small_tp2ep2", 4),
    )


def test_a_quarter_of_the_experts_and_what_all_have(folder):
    sys.path.append(str(HERE.parent.parent / "benchmarks"))
    from rank_memory import stored

    experts, rest = stored(folder / "checkpoint")
    assert experts > 10 * rest > 80e6
    for number in range(4):
        found = json.loads((folder / f"large.{number}.json").read_text())
        assert found["read"] == experts // 4 + rest
        assert found["held"] == experts // 4 + rest
        # What was freed before is used again, so that less may be seen; more is one tensor.
        assert 0.7 * found["held"] < found["peak"] < found["held"] + found["largest_tensor"] + 10e6


@pytest.mark.parametrize("name", ["small", "small_tp2ep2"])
def test_one_bit_of_a_copy(folder, name):
    """Ranks with copies of their own compare what they loaded, and no more than that; those with
    the same files read nothing for it. Block 5 is rank 2's (with tp2ep2, rank 2's and 3's)."""
    ranks = [json.loads((folder / f"{name}.{n}.copies.json").read_text()) for n in range(4)]
    for number, found in enumerate(ranks):
        read, compared = found["all the same"]
        assert compared == 0
        # Of the rank on the other host, what this one has not read itself.
        assert found["two hosts"][0] == read
        assert 0 < found["two hosts"][1] < read, number
    for case, tensor, rank in (("a block's", BLOCK, 2), ("all ranks'", EVERYONE, 1)):
        said = {found[case] for found in ranks if isinstance(found[case], str)}
        told = {
            re.fullmatch(
                r"rank (\d) \(here\) has another checkpoint than rank (\d) \(here\): "
                rf"'{re.escape(tensor)}' holds other numbers",
                text,
            )
            for text in said
        }
        assert told and None not in told, said
        assert all(str(rank) in match.groups() for match in told), said
