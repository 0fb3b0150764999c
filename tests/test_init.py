"""``dslc init``: a random checkpoint in the published form, of any model."""

import json
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dslc
from backends.pytorch.weights import write as writer
from compiler.passes.elaborate import run as elaborate
from compiler.tensors import patterns
from compiler.text import program_text
from dsl.constants import Choices
from dsl.files import shipped_models
from dsl.program import open_program
from dslc import cli
from oracle.checkpoint import read_tensors
from oracle.compare import assert_equal
from oracle.fp8 import is_fp8, quantise, quantization_config
from oracle.reference import Reference
from pytorch.small import SIZES

SETTINGS = [f"--set={name}={value}" for name, value in SIZES.items()]
OWN = """\
edition 2026
index t : time
const vocab  = config vocab_size else 11
const hidden = config hidden_size else 6
const depth  = 2
const rank   = config rank else 3
model Own {
  index w : vocab, d : hidden, l : depth
  param embed[w, d]
  if rank != null {
    index r : rank
    param low[r, d]
  }
  def main(token[t] of w) -> logits[t,w] {
    x[t,d] = embed[token[t], d]
    if rank != null {
      a[t,r] = low[r,d] * x[t,d]
      y[t,d] = low[r,d] * a[t,r]
    } else {
      y[t,d] = x[t,d]
    }
    logits[t,w] = embed[w,d] * y[t,d]
  }
}
"""


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command in this process, in an empty folder: (status, standard output, error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.run([str(a) for a in arguments])
        except SystemExit as exit:
            status = int(exit.code or 0)
        return (status, *capsys.readouterr())

    return run


# -- every shipped model ---------------------------------------------------------------------------

MODELS = [name for name in shipped_models() if open_program(name).model is not None]


@pytest.fixture(scope="module", params=MODELS)
def shipped(request, tmp_path_factory):
    """(model, its checkpoint at the preset small)."""
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    arguments = ["init", str(folder), request.param, "--dims", "small", "--dtype", "float32"]
    assert cli.run([*arguments, "--init-seed", "7"]) == 0
    yield request.param, folder
    shutil.rmtree(folder)


def test_config_json_gives_back_the_dims(shipped):
    name, folder = shipped
    config = json.loads((folder / "config.json").read_text())
    chosen = elaborate(open_program(name, Choices(preset="small")))
    read = elaborate(open_program(name, Choices(config=config)))
    assert read.constants == chosen.constants
    assert program_text(read) == program_text(chosen)


def test_it_runs_as_the_random_model_and_as_transformers(shipped, tmp_path):
    name, folder = shipped
    dslc.compile(name, checkpoint=str(folder)).save(tmp_path / "compiled")
    model = dslc.load(tmp_path / "compiled", folder)
    random = dslc.load(tmp_path / "compiled", seed=7).state_dict()
    stored = model.state_dict()
    assert stored.keys() == random.keys() and not model.notes
    assert all(torch.equal(stored[n], random[n]) for n in stored)
    tokens = torch.randint(1024, (17,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(tokens[None])[0]
    # Equality to rounding is held elsewhere, on well-conditioned weights; a wrong key is told.
    assert_equal(ours, Reference(folder).logits([tokens])[0], tolerance=1e-4)


# -- the files -------------------------------------------------------------------------------------


def test_shards_have_an_index(run, tmp_path):
    status, out, err = run("init", "c", "dsv3", *SETTINGS, "--shard-size", "8KB", "--json")
    assert status == 0 and not err
    found = json.loads(out)
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "c").glob("*.safetensors"))
    assert found == {
        "directory": "c", "model": "DeepSeekV3", "bytes": index["metadata"]["total_size"],
        "files": len(files),
    }  # fmt: skip
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
    assert set(index["weight_map"].values()) == set(files)
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "c" / file)  # the library reads what we write
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert all(index["weight_map"][name] == file for name in tensors)
        assert size <= 8_000 or len(tensors) == 1
        total += size
    assert total == found["bytes"]


def test_the_weights_are_rounded_once_and_states_are_not(run, tmp_path):
    assert run("init", "c", "dsv3", *SETTINGS)[0] == 0
    assert json.loads((tmp_path / "c" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    dslc.compile("dsv3", set=SIZES).save(tmp_path / "compiled")
    exact = dslc.load(tmp_path / "compiled").state_dict()
    for name, tensor in load_file(tmp_path / "c" / "model.safetensors").items():
        dtype = torch.float32 if name.endswith("bias") else torch.bfloat16
        assert torch.equal(tensor, exact[name].to(dtype))


def test_nothing_named_is_something_small(run, tmp_path):
    status, out, err = run("init", "c")
    assert (status, err) == (0, "") and out == "c: DeepSeekV3, 16.9 MB in 1 file\n"


def test_only_what_the_model_reads_is_said(run, tmp_path):
    """Not the YaRN of a model without, nor the experts' keys of other families."""
    assert run("init", "c", "qwen3_moe", "--dims", "small", "--set", "layers=1")[0] == 0
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "default", "rope_theta": 1e6}
    assert config["num_experts"] == 16 and "n_routed_experts" not in config


def test_a_few_chunks_are_in_memory_at_a_time(tmp_path, monkeypatch):
    """Not a tensor, and not a file: 2 MB of tensors of 32."""
    monkeypatch.setattr(writer, "CHUNK", 1 << 16)
    drawn, lock, alive, most = writer.values, threading.Lock(), 0, 0

    def count(size: int) -> None:
        nonlocal alive, most
        with lock:
            alive += size
            most = max(most, alive)

    def values(*arguments):
        made = drawn(*arguments)
        count(made.nbytes)
        weakref.finalize(made, count, -made.nbytes)
        return made

    monkeypatch.setattr(writer, "values", values)
    program = dslc.compile("llama3", dims="small", set={"vocab": 1 << 15, "layers": 1})
    written = writer.write_random(
        tmp_path, patterns(program.after("elaborate")), 0, torch.float32, 10**9
    )
    assert written > 64e6 and 0 < most < 2.1e6


# -- FP8 ------------------------------------------------------------------------------------------


def test_fp8_as_published(run, tmp_path, monkeypatch):
    """What DeepSeek-V3 keeps in FP8, quantised tile by tile, in chunks of one row of tiles."""
    monkeypatch.setattr(writer, "CHUNK", 1 << 15)
    sizes = {"layers": 2, "experts": 4, "groups": 2, "expert_ffn": 144, "per_token": 2}
    settings = [f"--set={name}={value}" for name, value in sizes.items()]
    given = ["dsv3", "--dims", "small", *settings]
    assert run("init", "c", *given, "--deploy", "fp8", "--shard-size", "1MB")[0] == 0
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["quantization_config"] == quantization_config((128, 128))
    dslc.compile("dsv3", checkpoint="c").save("compiled")
    exact, stored = dslc.load("compiled").state_dict(), read_tensors(tmp_path / "c")
    loaded = dslc.load("compiled", "c", dtype="float32").state_dict()
    published = {name for name in exact if is_fp8(name)}
    assert {name for name, t in stored.items() if t.dtype == torch.float8_e4m3fn} == published
    for name in published:
        weight, scales, meant = quantise(exact[name], (128, 128))
        assert torch.equal(stored[name].view(torch.uint8), weight.view(torch.uint8)), name
        assert torch.equal(stored[name + "_scale_inv"], scales)
        assert torch.equal(loaded[name], meant)
    for name in exact.keys() - published:
        assert torch.equal(loaded[name], stored[name].float())


FP8 = "precision {}(e4m3, activations = 1 x 128, weights = {}) for {}"
RULES = {
    "the last rule decides": (
        [FP8.format("a", "128 x 128", "MLA"), "precision b(bf16) for MLA.W_o"], None,
    ),
    "several tiles": (
        [FP8.format("a", "128 x 128", "MLA"), FP8.format("b", "64 x 64", "MoE")],
        "the deployment 'rules' has tiles of several sizes, and a checkpoint one",
    ),
    "a value": (
        [FP8.format("a", "128 x 128", "MLA.cq")],
        "the deployment 'rules' speaks of the value 'MLA.cq', and init of weights only: name "
        "parameters, uses or blocks",
    ),
    "no scale for each tile": (
        [FP8.format("a", "all x all", "MLA")],
        "the deployment 'rules' keeps no weights in E4M3 with a scale in FP32 for each tile, "
        "which is how FP8 checkpoints are published",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RULES)
def test_rules_of_a_deployment(run, tmp_path, kind):
    rules, refusal = RULES[kind]
    text = "\n  ".join(["edition 2026\nimport dsv3\ndeploy rules of DeepSeekV3 {", *rules])
    (tmp_path / "rules.arch").write_text(text + "\n}\n")
    status, _, err = run("init", "c", "rules.arch", *SETTINGS, "--deploy", "rules")
    if refusal is not None:
        assert (status, err) == (1, f"error: {refusal}\n") and left(tmp_path) == ["rules.arch"]
        return
    assert (status, err) == (0, "")
    stored = read_tensors(tmp_path / "c")
    fp8 = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert "model.layers.0.self_attn.q_a_proj.weight" in fp8
    assert not any("o_proj" in name or "mlp" in name for name in fp8)


def test_a_deployment_without_fp8(run, tmp_path):
    status, _, err = run("init", "c", "dsv3", "--dims", "small", "--deploy", "ep2")
    assert status == 1 and not list(tmp_path.iterdir())
    assert err == (
        "error: the deployment 'ep2' keeps no weights in E4M3 with a scale in FP32 for each tile, "
        "which is how FP8 checkpoints are published\n"
    )
    status, _, err = run("init", "c", "dsv3", "--dims", "small", "--deploy", "fp9")
    assert status == 1 and "no deployment of 'DeepSeekV3' is called 'fp9'" in err


# -- own models ------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.arch").write_text(OWN)
    return "own.arch"


def test_a_model_of_ones_own(run, own, tmp_path):
    status, out, err = run("init", "c", "--set", "hidden=8", "--dtype", "float32", own)
    assert (status, out, err) == (0, "c: Own, 448 B in 1 file\n", "")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config == {
        "vocab_size": 11, "hidden_size": 8, "rank": 3, "torch_dtype": "float32",
    }  # fmt: skip
    program = dslc.compile(own, checkpoint="c")
    program.save("compiled")
    assert dslc.load("compiled", "c", dtype="float32").state_dict()["embed"].shape == (11, 8)


def test_a_constant_without_a_key_is_told(run, own):
    status, _, err = run("init", "c", own, "--set", "depth=5")
    assert status == 0
    assert err == (
        "note: config.json does not say that 'depth' is 5, as the file binds it to no key: "
        "compile with --set depth=5 as well\n"
    )


# -- refusals --------------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_value_that_config_json_cannot_say(run, own, tmp_path):
    status, out, err = run("init", "c", own, "--set", "rank=null")
    assert (status, out) == (1, "") and left(tmp_path) == ["own.arch"]
    assert err == (
        "error: no config.json says that 'rank' is null: from rank it would be read as 3\n"
    )


def test_a_directory_that_is_not_empty(run, own, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("")
    status, _, err = run("init", "c", own)
    assert status == 1 and left(tmp_path / "c") == ["thesis.tex"]
    assert err == "error: will not write c: it is not empty; choose another directory\n"
    status, _, err = run("init", "own.arch", own)
    assert (status, err) == (1, "error: cannot write own.arch: it is a file, not a directory\n")


def test_an_empty_directory_is_taken(run, own, tmp_path):
    (tmp_path / "c").mkdir()
    assert run("init", "c", own)[0] == 0 and left(tmp_path / "c") == [
        "config.json",
        "model.safetensors",
    ]


def test_a_disk_that_is_too_small(run, own, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(1_000, 900, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    status, _, err = run("init", "c", own)
    assert status == 1 and left(tmp_path) == ["own.arch"]
    assert err == "error: the checkpoint needs 168 B; its disk has 100 B free\n"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_was_begun_is_removed(run, own, tmp_path, monkeypatch, failure):
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(writer, "values", fail)
    status, _, err = run("init", "c", own)
    assert left(tmp_path) == ["own.arch"]
    if failure is KeyboardInterrupt:
        assert (status, err) == (130, "\n")
    else:
        assert (status, err) == (1, "error: cannot write c: No space left on device\n")


def test_what_a_killed_one_left_is_removed_first(run, own, tmp_path, monkeypatch):
    """A whole directory that was moved aside is not, unless another takes its place."""
    unfinished, aside = tmp_path / ".c.0badcafe.writing", tmp_path / ".c.00c0ffee.writing"
    for folder, file in ((unfinished, "model.safetensors"), (aside, "manifest.json")):
        folder.mkdir()
        (folder / file).write_text("{}")
    usage = shutil._ntuple_diskusage(1_000, 900, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert run("init", "c", own)[0] == 1
    assert left(tmp_path) == [aside.name, "own.arch"]


@pytest.mark.parametrize("size", ["5XB", "0", "GB", "-1GB", "1e9"])
def test_a_shard_size_that_is_none(run, own, size):
    status, _, err = run("init", "c", own, f"--shard-size={size}")
    assert status == 2
    assert err.splitlines()[-1] == (
        f"dslc init: error: argument --shard-size: '{size}' is not a size such as 5GB, 200MiB or "
        "1000000"
    )
