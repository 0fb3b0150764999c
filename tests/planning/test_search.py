"""Other meshes for the same load, and this machine as a cluster."""

import json
import re
import subprocess
import sys

import pytest

from compiler.planning.search import candidates, search
from dslc.cli import run
from tests.planning.planned import compiled, plan, subject


def test_candidates_divide_and_hold():
    """Each one has as many ranks, experts and layers that divide, and enough micro-batches."""
    deployment = subject("pretrain").deployment
    found = list(candidates(deployment))
    assert found[0][0].mesh.sizes == {"pp": 16, "dp": 2, "ep": 64}
    assert len({(tuple(d.mesh.sizes.items()), batch) for d, batch in found}) == len(found)
    for one, _ in found:
        sizes = one.mesh.sizes
        assert one.mesh.size == 2048
        assert 256 % sizes["ep"] == 0
        assert one.micro_batches >= 2 * sizes["pp"]
        layers = [r for s in one.stages.stages for _, a, b in s.layers for r in range(a, b)]
        assert len(one.stages.stages) == sizes["pp"]
        assert layers == list(range(61))
        assert one.stages.stages[-1].extras == ("mtp",)


def test_the_best_is_no_worse_than_what_was_asked():
    about = subject("sglang_decode")
    searched = search(about.source, about.final, about.deployment)
    found = searched.best
    assert searched.count > 10 and searched.closest is None
    tokens = [one.tokens for one in found]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] >= plan("sglang_decode").tokens * 0.999
    assert all(one.plan.fits and one.plan.gpus <= 72 for one in found)
    assert "of memory" in found[0].why


def test_search_on_the_command_line(capsys):
    arguments = ["plan", "dsv3", "--deploy", "sglang_prefill", "--search", "--json"]
    assert run(arguments) == 0
    best = json.loads(capsys.readouterr().out)["search"]
    assert 1 <= len(best) <= 5
    assert set(best[0]) >= {"mesh", "batch", "tokens_per_second", "why"}


PRIMES = """edition 2026
import llama3
import clusters
deploy seven of Llama3 on h100 {
  mesh dp = 7  shard batch -> dp, optimizer -> replicas  train batch = 63, sequence = 2048
}
deploy three of Llama3 on h100 {
  mesh dp = 3  shard batch -> dp, optimizer -> replicas  train batch = 48, sequence = 2048
}
deploy pairs of Llama3 on h200 {
  mesh dp = 2, tp = 2  shard batch -> dp, SwiGLU.f -> tp, vocab -> tp
  serve decode context = 4096, tpot = 30 ms
}
"""


def test_numbers_of_gpus_that_hardly_divide(capsys, tmp_path):
    """One mesh is all that seven GPUs have; on three nothing fits, and it says what is missing;
    groups that share nothing are not listed as often as they can be counted."""
    file = tmp_path / "primes.arch"
    file.write_text(PRIMES)
    assert run(["plan", str(file), "--deploy", "seven", "--search"]) == 0
    assert "best of 1 within 7 GPUs" in capsys.readouterr().out
    assert run(["plan", str(file), "--deploy", "three", "--search"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"of 3 deployments within 3 GPUs none fits; the closest, dp 3 with micro-batch 1, 16 of "
        r"them: .*GB.*",
        said,
    ), said
    assert run(["plan", str(file), "--deploy", "pairs", "--search", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["search"]
    assert len({(b["tokens_per_second"], b["step_seconds"]) for b in best}) == len(best) > 1


def test_search_and_measured_durations_exclude_each_other(capsys, tmp_path):
    costs = tmp_path / "costs.json"
    costs.write_text('{"mlp": {"forward": 1e-3}}')
    arguments = ["plan", "dsv3", "--deploy", "pretrain", "--search", "--costs", str(costs)]
    assert run(arguments) == 1
    assert "--costs were measured on one" in capsys.readouterr().err


def test_this_machine_is_a_cluster_to_plan_with(tmp_path, capsys):
    """Two ranks of this machine, and the same two behind a slow link: what waiting and hiding
    take, all from what calibrate measured and the link's stated rate."""
    command = [sys.executable, "-m", "dslc", "calibrate", "-o", str(tmp_path / "here.arch")]
    subprocess.run(command, check=True, timeout=300)
    file = tmp_path / "local.arch"
    file.write_text("""edition 2026
import dsv3
import here
cluster linked from here {
  per_node = 1, nodes = 2
  peak[scale_out]    = 100 Mb/s "tc tbf, 2026"
  latency[scale_out] = 150 us   "gloo, 2026"
}
deploy near from ep2 on here { precision f32 serve prefill prompt = 64, tokens_per_rank = 512 }
deploy waits from near on linked {}
deploy hides from near on linked { overlap two_microbatches }
""")

    def planned(name: str) -> dict:
        assert run(["plan", str(file), "--dims", "small", "--deploy", name, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    near, waits, hides = map(planned, ("near", "waits", "hides"))
    assert near["fits"] and near["gpus"] == 2
    assert all("measured on this machine" in rate["source"] for rate in near["rates"].values())
    sent = waits["communication"]["total_seconds"]
    # 2 of 4 groups are open, 2 groups are on each rank: with 1/6 none of the other rank's, with
    # 4/6 one, and then 4 picks of 8 experts avoid it in 1 of 70 ways
    reached = 1 - 1 / 6 - 4 / 6 / 70
    row = 256 * 4  # float32, to the other rank and back, in 3 layers
    assert sent == pytest.approx(3 * 2 * (512 * reached * row / 12.5e6 + 150e-6), rel=0.02)
    assert near["time"]["step"] < hides["time"]["step"] < waits["time"]["step"]
    times = hides["pass"]
    assert times["overlapped_seconds"] == hides["time"]["step"]
    assert times["bound_seconds"] <= times["overlapped_seconds"] <= times["sequential_seconds"]


@pytest.mark.parametrize("file", ["llama3", "mixtral", "qwen3_moe", "qwen3_next", "dsv3_2"])
def test_other_models_can_be_planned(tmp_path, file, capsys):
    """Dense models, other routers, windows, recurrences and chosen positions, on one H100 node."""
    name = compiled(file).program.name
    path = tmp_path / "served.arch"
    path.write_text(
        f"edition 2026\nimport {file}\nimport clusters\n"
        f"deploy one of {name} on gb200_nvl72 {{\n"
        "  serve decode context = 2000, batch_per_rank = 8\n}\n"
    )
    assert run(["plan", str(path), "--deploy", "one", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    from compiler.report import report

    about = report(compiled(file).after("elaborate"))
    weights = data["memory_per_gpu_bytes"]["weights"]
    assert weights == pytest.approx(2 * about.parameters, rel=0.01)
    cache = 8 * (2000 * about.cache_bytes_per_token + about.state_bytes_per_sequence)
    assert data["memory_per_gpu_bytes"]["cache"] == pytest.approx(cache, rel=0.01)
