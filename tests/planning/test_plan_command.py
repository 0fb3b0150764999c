"""``dslc plan`` as a user meets it: the table, JSON, a trace, a report, and what it refuses."""

import json
import os
import shutil
import subprocess

import pytest

from dslc.cli import run

KEYS = """gpus mesh fits memory_per_gpu_bytes time tokens_per_second tokens_per_second_per_node
tokens_per_second_per_gpu tpot_seconds tokens_per_day mfu gpu_hours_per_trillion_tokens
communication assumptions""".split()


def planned(capsys, *arguments: str) -> dict:
    assert run(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    assert run(["plan", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.fixture
def deployed(tmp_path):
    """A file with one deployment of a shipped model, and clusters of its own."""

    def write(text: str, model: str = "dsv3") -> str:
        path = tmp_path / "mine.arch"
        path.write_text(f"edition 2026\nimport {model}\nimport clusters\n\n{text}\n")
        return str(path)

    return write


def test_json_has_the_settled_keys(capsys):
    data = planned(capsys, "dsv3", "--deploy", "pretrain")
    assert set(KEYS) <= set(data)
    memory = data["memory_per_gpu_bytes"]
    assert memory["total"] == pytest.approx(sum(v for k, v in memory.items() if k != "total"))
    assert data["mesh"] == {"pp": 16, "dp": 2, "ep": 64}
    assert data["gpus"] == 2048
    assert len(data["assumptions"]) == 3
    assert data["tpot_seconds"] is None
    assert all(rate["source"] for rate in data["rates"].values())


def test_serving_says_what_does_not_apply(capsys):
    data = planned(capsys, "dsv3", "--deploy", "sglang_decode")
    assert data["mfu"] is None
    assert data["time"]["pair"] is None
    assert data["tpot_seconds"] == data["time"]["step"]
    assert data["tokens_per_second"] == pytest.approx(72 * 256 / data["time"]["step"])
    assert data["tokens_per_second_per_node"] == pytest.approx(data["tokens_per_second"] / 9)


def test_the_table(capsys):
    assert run(["plan", "dsv3", "--deploy", "pretrain"]) == 0
    out = capsys.readouterr().out
    for said in (
        "DeepSeekV3, pretrain: 2,048 H800 (pp 16 x dp 2 x ep 64)",
        "GPU hours per trillion",
        "of 75.9 GB: fits",
        "what matters most",
        "rate[scale_out]",
        "assumed, 2026",
    ):
        assert said in out, said


def test_a_trace(capsys, tmp_path):
    out = tmp_path / "trace.json"
    planned(capsys, "dsv3", "--deploy", "pretrain", "--trace", str(out))
    events = json.loads(out.read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"rank 0", "rank 15", "compute", "communicate"} <= names
    threads: dict[tuple[int, int], float] = {}
    for event in sorted(spans, key=lambda e: e["ts"]):
        key = event["pid"], event["tid"]
        assert event["ts"] >= threads.get(key, 0.0) - 1e-3, "two things at once on one stream"
        threads[key] = event["ts"] + event["dur"]


def test_a_report_in_a_browser(capsys, tmp_path):
    """It renders without script errors, and asks for nothing from anywhere."""
    page = tmp_path / "plan.html"
    planned(capsys, "dsv3", "--deploy", "pretrain", "--html", str(page))
    text = page.read_text()
    assert "http://" not in text and "https://" not in text and "<script" not in text
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("no Chromium here: the report was not rendered")
    picture, log = tmp_path / "plan.png", tmp_path / "net.json"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
        "--window-size=1080,1600",
        f"--log-net-log={log}",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
        page.as_uri(),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert ":CONSOLE" not in done.stderr
    assert picture.stat().st_size > 30_000, "an empty page"
    dom = subprocess.run(
        [*command[:4], f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert dom.count("<rect") > 100
    assert "Roofline" in dom and "Memory of a GPU" in dom


# -- measured durations ----------------------------------------------------------------------------

LAYER = {
    "attention": {"forward": 3e-3, "backward": 6e-3, "weight": 2e-3},
    "mlp": {"forward": 3e-3, "backward": 4e-3, "weight": 3e-3},
    "dispatch": {"forward": 2.5e-3, "backward": 4.7e-3},
    "combine": {"forward": 4.7e-3, "backward": 2.5e-3},
}


def test_durations_from_a_file(capsys, tmp_path):
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps(LAYER))
    data = planned(capsys, "dsv3", "--deploy", "pretrain", "--costs", str(costs))
    pair = data["pair"]
    assert pair["sequential_seconds"] == pytest.approx(4 * (21e-3 + 14.4e-3))
    bound = max(4 * 21e-3 / (1 - 20 / 132), 4 * 14.4e-3)
    assert pair["bound_seconds"] == pytest.approx(bound)
    assert pair["hidden_fraction"] >= 0.96


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "must hold an object with attention, mlp, dispatch, combine"),
        ('{"atention": {}}', "'atention' is no part of a layer; did you mean 'attention'?"),
        ('{"mlp": 3}', "'mlp' must hold forward, backward, weight, in seconds"),
        ('{"mlp": {"back": 1}}', "'mlp' has no phase 'back'; it has forward, backward, weight"),
        ('{"mlp": {"forward": -1}}', "mlp.forward must be seconds, 0 or more, not -1"),
        ('{"mlp": {"forward": "1 ms"}}', 'mlp.forward must be seconds, 0 or more, not "1 ms"'),
        ('{"combine": {"weight": 1}}', "'combine' has no phase 'weight'; it has forward, backward"),
    ],
)
def test_durations_that_are_none(capsys, tmp_path, text, said):
    costs = tmp_path / "costs.json"
    costs.write_text(text)
    err = refused(capsys, "dsv3", "--deploy", "pretrain", "--costs", str(costs))
    assert err.startswith("error: ") and said in err


def test_durations_need_a_layer_that_sends(capsys, tmp_path, deployed):
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps(LAYER))
    served = "serve decode context = 100, batch_per_rank = 1"
    file = deployed(f"deploy one of Llama3 on h100 {{ {served} }}", "llama3")
    err = refused(capsys, file, "--deploy", "one", "--costs", str(costs))
    assert "none does" in err


# -- what cannot be planned ------------------------------------------------------------------------


def test_without_a_deployment(capsys):
    err = refused(capsys, "dsv3")
    assert err.startswith("error: plan needs a deployment: --deploy NAME (fp8, pretrain, prefill,")


def test_without_a_cluster(capsys):
    err = refused(capsys, "dsv3", "--deploy", "ep2")
    assert "'ep2' runs on no cluster" in err
    assert "deploy mine from ep2 on h800 {}" in err


def test_without_a_load(capsys, deployed):
    err = refused(capsys, deployed("deploy mine from fp8 on h800 {}"), "--deploy", "mine")
    assert "says neither what is trained nor what is served" in err


def test_an_unknown_cluster(capsys, deployed):
    err = refused(capsys, deployed("deploy mine from decode on h801 {}"), "--deploy", "mine")
    assert "h801" in err and "did you mean 'h800'?" in err


def test_a_mesh_larger_than_its_cluster(capsys, deployed):
    text = "cluster two from h800 { nodes = 2 }\ndeploy mine from decode on two {}"
    err = refused(capsys, deployed(text), "--deploy", "mine")
    assert "the mesh has 144 ranks, and cluster 'two' has 16 devices" in err


@pytest.mark.parametrize("figure", ["peak[scale_out]", "rate[scale_out]", "rate[memory]"])
def test_a_bandwidth_of_zero(capsys, deployed, figure):
    slow = f'cluster slow from h800 {{ {figure} = 0 GB/s "nowhere, 2026" }}'
    text = f"{slow}\ndeploy mine from decode on slow {{}}"
    err = refused(capsys, deployed(text), "--deploy", "mine")
    assert f"'{figure}' must be above 0" in err


def test_what_does_not_fit_says_how_much(capsys, deployed):
    small = 'cluster small from h800 { memory = 40 GB "a smaller one, 2026" }'
    file = deployed(f"{small}\ndeploy mine from pretrain on small {{}}")
    assert run(["plan", file, "--deploy", "mine", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["fits"] is False
    assert "it does not fit: a rank needs 69.2 GB, and a H800 has 35.9 GB to give" in err


def test_nothing_is_left_of_the_memory(capsys, deployed):
    full = 'cluster full from h800 { reserved = 90 GB "me, 2026" }'
    err = refused(
        capsys, deployed(f"{full}\ndeploy mine from decode on full {{}}"), "--deploy", "mine"
    )
    assert err == (
        "error: cluster 'full' reserves 90.0 GB of a device's 80.0 GB, which leaves nothing to run"
        " in\n"
    )


def test_no_utilisation(capsys, deployed):
    text = "deploy mine from decode on h800 { serve decode context = 99, utilisation = 0% }"
    err = refused(capsys, deployed(text), "--deploy", "mine")
    assert "utilisation must be above 0" in err


def test_stages_that_ranks_take_turns_in(capsys, deployed):
    text = """deploy mine of DeepSeekV3 on h800 {
  mesh pp = 4, ep = 8
  stages pp : layers 0 .. 61 as (4 x 15, 1), mtp with the last
  shard batch -> ep, MoE.expert -> ep, optimizer -> replicas
  train batch = 64, sequence = 4096
}"""
    file = deployed(text)
    err = refused(capsys, file, "--deploy", "mine")
    assert err == (
        f"error: {file}:7: 16 stages on 4 ranks; interleaved stages are not planned yet, so there"
        " must be as many as ranks: as (16 x 1, 15 x 3)\n"
        "  (a part 'N x M' is M stages of N layers)\n"
    )


def test_a_cluster_that_says_nothing_of_its_memory(capsys, deployed):
    text = """
device D { peak[bf16] = 1 PFLOPS "me, 2026"  peak[scale_up] = 100 GB/s "me, 2026" }
cluster c { gpu = D, per_node = 8, nodes = 1 }
deploy mine of Llama3 on c { serve decode context = 100, batch_per_rank = 1 }
"""
    err = refused(capsys, deployed(text, "llama3"), "--deploy", "mine")
    assert "cluster 'c' does not say how fast its memory is: peak[memory]" in err


def test_positions_that_are_divided_are_refused(capsys, deployed):
    text = (
        "deploy mine of Llama3 on h100 { mesh cp = 8  shard t -> cp  serve prefill prompt = 4096 }"
    )
    err = refused(capsys, deployed(text, "llama3"), "--deploy", "mine")
    assert "divides positions" in err


def test_a_file_that_cannot_be_written(capsys):
    err = refused(capsys, "dsv3", "--deploy", "decode", "--trace", "/nowhere/trace.json")
    assert "cannot write /nowhere/trace.json" in err


def test_a_decode_that_misses_its_tpot(capsys, deployed):
    asked = "serve decode context = 4989, batch_per_rank = 128, tpot = 5 ms"
    file = deployed(f"deploy mine from decode on h800 {{ {asked} }}")
    assert run(["plan", file, "--deploy", "mine"]) == 0
    assert "and tpot asks for 5 ms" in capsys.readouterr().out
