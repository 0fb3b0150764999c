"""Quantised products from the command line: what is shown, what is written, what runs."""

import json

import pytest
import torch

import dslc
from compiler.text import parse
from dslc.cli import run

SMALL = ["dsv3", "--dims", "small", "--deploy", "fp8"]


def test_inspect_has_a_row_for_each_contraction(capsys):
    assert run(["inspect", *SMALL, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["precision"]
    found = {(row["value"], row["parameter"], row["path"]): row for row in rows}
    assert found["ckv", "W_dkv", "layers[0].attn"] == {
        "path": "layers[0].attn",
        "value": "ckv",
        "parameter": "W_dkv",
        "source": "std/mla.arch:50",
        "count": 5,  # four layers, and the MTP module's
        "cast": True,
        "activations": "e4m3 1 x 128",
        "weights": "e4m3 128 x 128",
        "promote": 128,
        "reason": "",
    }
    assert run(["inspect", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "the rule excepts it" in shown and "e4m3 128 x 128" in shown
    assert run(["inspect", "dsv3", "--dims", "small", "--deploy", "ep2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == []


def test_the_graph_tells_what_was_cast_and_reads_back(capsys):
    assert run(["compile", *SMALL, "--emit", "graph", "--after", "fp8"]) == 0
    text = capsys.readouterr().out
    parse(text)
    place = "layers[0].attn, x 5 (std/mla.arch"
    assert f"// cast cq * W_dq at {place}:45)\n" in text
    why = "is multiplied in another order where that costs less"
    assert f"// left k * W_ukv at {place}:54): {why}\n" in text


def test_a_directory_says_how_weights_are_kept(tmp_path, capsys):
    assert run(["compile", *SMALL, "-o", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["deployment"] == "fp8"
    stored = {row["path"]: row["stored"] for row in manifest["parameters"]}
    assert stored["embed"] is None and stored["layers[{0}].mlp.centroid"] is None
    row = stored["layers[{0}].attn.W_ukv"]
    assert row["tile"] == [128, 128]
    assert row["format"]["name"] == "e4m3" and row["format"]["largest"] == 448
    assert row["format"]["scale"]["name"] == "f32"
    capsys.readouterr()
    given = ["run", str(tmp_path / "out"), "--tokens", "1,2,3", "--max-new-tokens", "2", "--json"]
    assert run(given) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"][0]) == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_and_single_tokens_agree_but_for_rounding(tmp_path, dtype):
    """Absorbed or not, W_ukv is read as its codes stand for it, and its factor is not quantised."""
    program = dslc.compile("dsv3", dims="small", deploy="fp8", set={"layers": 1, "dense": 1})
    program.save(tmp_path / "m")
    model = dslc.load(tmp_path / "m", seed=0, dtype=dtype)
    tokens = torch.randint(1024, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(1)
        steps = torch.cat([model(tokens[:, i : i + 1], cache=cache) for i in range(12)], 1)
    assert (whole - steps).norm() <= 2e-2 * whole.norm()


def test_a_deployment_whose_scales_are_powers_of_two(tmp_path):
    file = tmp_path / "ue.arch"
    rule = "e4m3_ue8m0, activations = 1 x 128, weights = 128 x 128, promote = 128"
    file.write_text(
        "edition 2026\nimport dsv3\nimport std.formats\n"
        f"deploy ue of DeepSeekV3 {{ precision fp8({rule})\n"
        "  for contractions with a parameter, except embed, head, centroid, W_eh }\n"
    )
    dslc.compile(file, dims="small", deploy="ue").save(tmp_path / "m")
    model = dslc.load(tmp_path / "m", seed=0)
    scale = model.weight("layers[0].mlp.W_down").scale
    assert (scale.log2() % 1 == 0).all()
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
