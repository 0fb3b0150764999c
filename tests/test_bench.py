"""``dslc bench``: contestants in turns, on the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backends.pytorch.ahead.plan import Call, Plan
from compiler import manifest
from dslc import cli
from dslc.bench.roof import bytes_per_token

SIZES = ["--set", "layers=2", "--set", "experts=8", "--set", "groups=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A compiled directory, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("bench")
    small = ["dsv3", "--dims", "small", *SIZES]
    assert cli.run(["init", str(folder / "ckpt"), *small, "--dtype", "float32"]) == 0
    given = ["--checkpoint", str(folder / "ckpt"), "-o", str(folder / "built")]
    assert cli.run(["compile", "dsv3", *given]) == 0
    return folder / "built", folder / "ckpt"


def test_contestants_take_turns_and_agree(made, capsys):
    built, checkpoint = made
    short = ["--prompt-tokens", "6", "--new-tokens", "4", "--rounds", "1", "--dtype", "float32"]
    capsys.readouterr()
    assert cli.run(["bench", str(built), "--checkpoint", str(checkpoint), *short, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert [*rows][:2] == ["dslc", "transformers"]
    assert rows["transformers"]["same_tokens"] == 4  # the same weights, float32
    for row in rows.values():
        assert row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0
    assert {*rows} | {*found["absent"]} == {"dslc", "transformers", "llama.cpp"}
    assert found["roof"]["decode_tokens_per_second"] == pytest.approx(
        found["roof"]["bytes_per_second"] / found["roof"]["bytes_per_token"]
    )


def test_what_cannot_take_part_is_said(made, capsys):
    short = ["--prompt-tokens", "3", "--new-tokens", "2", "--rounds", "1"]
    capsys.readouterr()
    assert cli.run(["bench", str(made[0]), *short]) == 0
    said = capsys.readouterr()
    assert "dslc" in said.out
    assert (
        "note: transformers does not take part: it needs a --checkpoint (dslc init writes one)\n"
    ) in said.err


def test_a_checkpoint_that_is_not_there(made, capsys):
    capsys.readouterr()
    assert cli.run(["bench", str(made[0]), "--checkpoint", "nowhere", "--alone"]) == 1
    assert capsys.readouterr().err == "error: dslc: there is no checkpoint folder nowhere\n"


def test_one_new_token_cannot_be_timed(made, capsys):
    with pytest.raises(SystemExit):
        cli.run(["bench", str(made[0]), "--new-tokens", "1"])
    assert "decoding is timed from the second token on: at least 2" in capsys.readouterr().err


def test_what_a_token_reads(made):
    """Of the experts those it picks; a byte for what is kept in FP8; two for a cached number."""
    about = manifest.read(made[0])
    graph = (made[0] / "source.txt").read_text()
    patterns = [row.pattern() for row in about.parameters]
    sizes = about.constants
    hidden, expert = int(sizes["hidden"] or 0), int(sizes["expert_ffn"] or 0)
    picked = int(sizes["per_token"] or 0)
    call = Call(
        piece="", values=(), caches=(), results=(),
        weights=("layers.1.mlp.expert.*.W_up", "layers.1.mlp.expert.*.W_up#scale"),
    )  # fmt: skip
    plan = Plan(
        dtype="bfloat16", torch="", machine="", features=(), block=(128, 128), calls=(call,),
        logits=0,
    )  # fmt: skip
    plain = bytes_per_token(graph, 2, 0)
    kept = bytes_per_token(graph, 2, 0, plan, patterns)
    assert plain - kept == hidden * expert * picked
    per_position = bytes_per_token(graph, 2, 1) - plain
    latent = int(sizes["kv_rank"] or 0) + int(sizes["rope"] or 0)
    assert per_position == 2 * 2 * latent  # two layers, two bytes
