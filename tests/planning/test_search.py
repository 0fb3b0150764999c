"""Other meshes for the same load, and this machine as a cluster."""

import json
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
    found, count = search(about.source, about.final, about.deployment)
    assert count > 10
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


def test_search_and_measured_durations_exclude_each_other(capsys, tmp_path):
    costs = tmp_path / "costs.json"
    costs.write_text('{"mlp": {"forward": 1e-3}}')
    arguments = ["plan", "dsv3", "--deploy", "pretrain", "--search", "--costs", str(costs)]
    assert run(arguments) == 1
    assert "--costs were measured on one" in capsys.readouterr().err


def test_this_machine_is_a_cluster_to_plan_with(tmp_path):
    mine, file = tmp_path / "mine.arch", tmp_path / "local.arch"
    command = [sys.executable, "-m", "dslc", "calibrate", "-o", str(mine)]
    subprocess.run(command, check=True, timeout=300)
    file.write_text(
        "edition 2026\nimport dsv3\nimport mine\n"
        "deploy local from fp8 on here { serve decode context = 64, batch_per_rank = 2 }\n"
    )
    command = [sys.executable, "-m", "dslc", "plan", str(file), "--dims", "small"]
    command += ["--deploy", "local", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    data = json.loads(done.stdout)
    assert data["fits"] and data["gpus"] == 1
    assert all("measured on this machine" in rate["source"] for rate in data["rates"].values())


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
