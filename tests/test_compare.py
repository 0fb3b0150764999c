"""``dslc compare``: damage is found, by source line, in the block that was damaged."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import dslc
from backends.pytorch.watch import watching
from dsl.files import models_folder
from dslc import cli, compare
from pytorch.small import SIZES, compiled, prompts, weights, write

STD = Path(dslc.__file__).parent.parent / "dsl" / "std"


@pytest.fixture
def run(capsys):
    """Run the command in this process: (status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.run(["compare", *(str(a) for a in arguments)])
        except SystemExit as exit:
            status = int(exit.code or 0)
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of two layers, by the model's name, and what the shipped file compiles to."""
    folder = tmp_path_factory.mktemp("compare")
    for name in ("llama3", "dsv3", "mixtral"):
        arguments = ["init", str(folder / name), name, "--dims=small", "--set=layers=2"]
        assert cli.run([*arguments, "--dtype=float32"]) == 0
        program = dslc.compile(name, checkpoint=str(folder / name))
        program.save(folder / f"{name}.compiled")
    return folder


# What is damaged: the model, the file of the standard library (None: the model's own), what is
# replaced by what; and where it is found: the first value that differs from transformers', its
# block, the file of the line; and with the undamaged directory, the first value that differs.
DAMAGE = {
    "eps": (
        "llama3", None, "mlp_norm  = RMSNorm[d]", "mlp_norm  = RMSNorm[d](eps = 1e-3)",
        ("layers[0].mlp_norm", "RMSNorm", "std/norm.arch"), "layers[0].mlp_norm.y",
    ),
    "residual": (
        "llama3", None, "y[t,d] = h[t,d] + mlp", "y[t,d] = x[t,d] + mlp",
        ("layers[0]", "Layer", "damaged.arch"), "layers[0].y",
    ),
    "rotary halves": (
        "llama3", "gqa", "rotary_halves[n](q[t", "rotary[n](q[t",
        ("layers[0].attn", "GQA", "gqa.arch"), "layers[0].attn.q_r",
    ),
    "scale of the scores": (
        "dsv3", "mla", "* softmax_scale", "* 0.1",
        ("layers[0].attn", "MLA", "mla.arch"), "layers[0].attn.o",
    ),
    "scale of the experts": (
        "dsv3", "moe", "+ 1e-20) * routed_scale", "+ 1e-20)",
        ("layers[1].mlp", "MoE", "moe.arch"), "layers[1].mlp.gate",
    ),
    "the last norm": (
        "dsv3", None, "h[t,d]  = norm(x2[t,d])", "h[t,d]  = norm(x2[t,d] * x2[t,d])",
        ("norm", "RMSNorm", "std/norm.arch"), "norm.y",
    ),
    "the head": (
        "dsv3", None, "head[w,d] * trunk(token[t])", "head[w,d] * trunk(token[t]) * 2",
        ("logits", "DeepSeekV3", "damaged.arch"), "logits",
    ),
    "a module of another name": (
        "mixtral", "moe", "weight[k] / sum[k](weight[k])", "weight[k]",
        ("layers[0].mlp", "SoftmaxMoE", "moe.arch"), "layers[0].mlp.gate",
    ),
}  # fmt: skip


def damaged(folder: Path, kind: str, to: Path) -> Path:
    """Compile the model with one thing changed."""
    name, library, old, new, *_ = DAMAGE[kind]
    to.mkdir()
    model = (models_folder() / f"{name}.arch").read_text()
    clusters = models_folder() / "clusters.arch"
    (to / "clusters.arch").write_text(clusters.read_text())
    if library is None:
        assert old in model
        model = model.replace(old, new)
    else:
        text = (STD / f"{library}.arch").read_text()
        assert old in text
        (to / f"{library}.arch").write_text(text.replace(old, new))
        model = model.replace(f"import std.{library}\n", f"import {library}\n")
    (to / "damaged.arch").write_text(model)
    dslc.compile(to / "damaged.arch", checkpoint=str(folder / name)).save(to / "compiled")
    return to / "compiled"


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(run, folder, tmp_path, kind):
    name, *_, (module, block, file), value = DAMAGE[kind]
    ours, checkpoint = damaged(folder, kind, tmp_path / "d"), folder / name
    status, out, err = run(ours, "--with", "transformers", "--checkpoint", checkpoint, "--json")
    first = json.loads(out)["first"]
    assert (status, err) == (1, "")
    assert (first["path"], first["block"]) == (module, block)
    where = first["place"].rpartition(":")[0]
    assert where.endswith(file)
    assert first["equation"] in source_lines(ours, where)
    other = folder / f"{name}.compiled"
    status, out, err = run(ours, other, "--checkpoint", checkpoint, "--json")
    found = json.loads(out)
    assert (status, err) == (1, "") and found["first"]["path"] == value


def source_lines(ours: Path, file: str) -> list[str]:
    path = STD / Path(file).name if file.startswith("std/") else ours.parent / Path(file).name
    return [" ".join(line.partition("#")[0].split()) for line in path.read_text().splitlines()]


def test_an_equation_that_was_changed_is_told_with_the_other(run, folder, tmp_path):
    ours = damaged(folder, "residual", tmp_path / "d")
    status, out, err = run(ours, folder / "llama3.compiled", "--checkpoint", folder / "llama3")
    out = re.sub(r"\S*damaged\.arch", "damaged.arch", out)
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[1].startswith("first difference: layers[0].y in Layer, damaged.arch:33, used at ")
    assert lines[2] == "  y[t,d] = x[t,d] + mlp(mlp_norm(h[t,d]))"
    assert lines[3].endswith("llama3.arch:33: y[t,d] = h[t,d] + mlp(mlp_norm(h[t,d]))")
    assert lines[5] == "  the value before it agrees: layers[0].mlp.y, std/ffn.arch:17"
    assert lines[-1].startswith("logits: max|a - b| ")


@pytest.mark.parametrize("name", ["llama3", "dsv3", "mixtral"])
def test_what_is_not_damaged_agrees(run, folder, name):
    given = [folder / f"{name}.compiled", "--checkpoint", folder / name]
    status, out, err = run(*given, "--with", "transformers")
    assert (status, err) == (0, "")
    assert re.search(r"^no difference: the largest is \S+e-0[67], of ", out, re.MULTILINE)
    assert out.splitlines()[-1].endswith("; all greedy tokens are the same")
    status, out, err = run(*given, folder / f"{name}.compiled", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "") and found["equal"] and found["not_compared"] == 0
    assert found["first"] is None and found["logits"]["max_abs"] == 0
    assert len(found["tokens"]) == 16 and found["tolerance"] == 1e-5


def test_blocks_that_are_compared(run, folder):
    """All that transformers has a module for: norms, attention, experts together, layers."""
    given = [folder / "dsv3.compiled", "--checkpoint", folder / "dsv3"]
    found = json.loads(run(*given, "--with", "transformers", "--json")[1])
    parts = ["attn_norm", "attn.q_norm", "attn.kv_norm", "attn", "mlp_norm"]
    assert [row["path"] for row in found["values"]] == [
        *(f"layers[0].{part}" for part in [*parts, "mlp"]), "layers[0]",
        *(f"layers[1].{part}" for part in [*parts, "mlp.shared", "mlp"]), "layers[1]", "norm",
    ]  # fmt: skip


def test_dtypes(run, folder):
    given = [folder / "llama3.compiled"] * 2 + ["--checkpoint", folder / "llama3"]
    assert run(*given, "--dtype", "bfloat16", "--tolerance", 0)[0] == 0
    status, out, _ = run(*given, "--other-dtype", "bfloat16", "--json", "--tokens", "5,3,9")
    found = json.loads(out)
    assert found["tolerance"] == 2e-2 and found["tokens"] == [5, 3, 9]
    status, out, _ = run(*given, "--other-dtype", "bfloat16", "--tolerance", "1e-5")
    assert status == 1 and "first difference: x in Llama3" in out  # the embedding, rounded


def test_without_a_checkpoint_both_have_the_same_random_weights(run):
    assert run(compiled(), compiled())[0] == 0


def test_an_edited_model_is_run_when_asked(run, tmp_path):
    dslc.compile("dsv3", set=SIZES).save(tmp_path / "c")
    file = tmp_path / "c" / "model.py"
    text = file.read_text()
    line = "        up = F.linear(x, self.W_up)\n"
    assert line in text
    file.write_text(text.replace(line, line.replace("x,", "x * 1.5,")))
    status, _, err = run(tmp_path / "c", compiled())
    assert status == 1 and "model.py is not the file that was compiled" in err
    status, out, _ = run(tmp_path / "c", compiled(), "--edited", "--json")
    first = json.loads(out)["first"]
    assert status == 1 and (first["path"], first["place"]) == (
        "layers[0].mlp.up",
        "std/ffn.arch:15",
    )


def test_watching_changes_nothing(folder):
    model = dslc.load(compiled())
    tokens = prompts(2, 6)
    with torch.no_grad():
        plain = model(tokens, torch.tensor([6, 3]))
        with watching(model) as values:
            seen = model(tokens, torch.tensor([6, 3]))
    assert torch.equal(plain, seen) and sys.gettrace() is None
    traced = model.trace(["layers[1].attn.cq", "layers[2].mlp.weight"], tokens[:1])
    for path, expected in traced.items():
        [value] = [v for v in values if v.path == path]
        assert torch.allclose(value.tensor[:6], expected[0], atol=1e-5)


def test_forms_of_a_value():
    a = torch.arange(6.0).reshape(1, 2, 3)
    assert compare.difference(a, a.reshape(2, 3)) == (0, 0)
    assert compare.difference(a[0], a.reshape(2, 3, 1)) == (0, 0)
    assert compare.difference(torch.ones(4, 2, 3), torch.ones(4, 6) * 2) == (1, 0.5)
    assert compare.difference(a, a[..., :2]) is None
    infinite = torch.tensor([-torch.inf, 1.0])
    assert compare.difference(infinite, infinite) == (0, 0)
    assert compare.difference(infinite, torch.tensor([0.0, 1.0]))[0] == torch.inf
    assert compare.difference(torch.tensor([torch.nan, 1]), torch.ones(2))[0] > 1e300
    assert compare.difference(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 4, 3])) == (2, 0.5)


# -- refusals --------------------------------------------------------------------------------------


def test_one_message(run, tmp_path):
    folder = write(tmp_path / "c", weights(), model_type="unheard_of")
    for arguments, message in [
        ([compiled(), "--with", "transformers"],
         "--with transformers needs --checkpoint, which both are to run"),
        ([tmp_path, compiled()], f"{tmp_path} is not a compiled model: no manifest.json in it"),
        ([compiled(), compiled(), "--dtype", "int4"],
         "dtype 'int4': a model runs in float32, bfloat16, float16"),
        ([compiled(), compiled(), "--tokens", "51"], "'token' 51 is not one of 0 .. 50"),
    ]:  # fmt: skip
        assert run(*arguments) == (1, "", f"error: {message}\n")
    status, out, err = run(compiled(), "--with", "transformers", "--checkpoint", folder)
    assert (status, out) == (1, "") and len(err.splitlines()) == 1
    assert err.startswith(f"error: transformers cannot load {folder}: The checkpoint you are")


def test_misuse(run):
    for arguments in ([compiled()], [compiled(), compiled(), "--with", "transformers"]):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "") and err.startswith("usage: dslc compare")
        assert err.splitlines()[-1].partition(": error: ")[2] == (
            "either DIR_B or --with transformers says what DIR is compared with"
        )
    status, _, err = run("a", "--tokens", "1", "b", "c")
    assert status == 2 and err.endswith("error: unrecognized arguments: b c\n")


def test_other_vocabularies(run, folder, tmp_path):
    dslc.compile("dsv3", set={**SIZES, "vocab": 50}).save(tmp_path / "c")
    status, out, err = run(tmp_path / "c", compiled())
    assert (status, out) == (1, "")
    assert err == "error: the logits have other shapes: [16, 50] and [16, 51]\n"


def test_transformers_is_named_where_it_is_missing(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    folder = write(tmp_path / "c", weights())
    assert run(compiled(), "--with", "transformers", "--checkpoint", folder) == (
        1, "", "error: --with transformers needs it: pip install transformers\n",
    )  # fmt: skip
