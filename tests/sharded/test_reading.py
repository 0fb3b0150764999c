"""A rank reads its own slices and no other byte, and has memory for those alone."""

import json
import sys

import pytest
from meshes import SIZES
from ranks import HERE, launch, once

import dslc
from dslc import cli

# 24 experts of 1.6 MB in each of 4 layers (one for MTP) make 151 MB; the rest is a few MB.
LARGE = {
    "hidden": 256, "vocab": 512, "layers": 4, "dense": 1, "ffn": 512, "heads": 4, "q_rank": 64,
    "kv_rank": 64, "nope": 32, "rope": 16, "value": 32, "experts": 24, "groups": 4,
    "open_groups": 2, "per_token": 3, "expert_ffn": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return once(tmp_path_factory, "reading", prepared)


def prepared(folder):
    for name, sizes in (("checkpoint", LARGE), ("small-checkpoint", SIZES)):
        settings = [f"--set={key}={value}" for key, value in sizes.items()]
        assert cli.run(["init", str(folder / name), "dsv3", *settings, "--dtype=float32"]) == 0
    dslc.compile("dsv3", set=LARGE, deploy="ep4").save(folder / "large")
    dslc.compile("dsv3", set=SIZES, deploy="ep4").save(folder / "small")
    launch(folder, ("reading.rank", "large", 4))


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
