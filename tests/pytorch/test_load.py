"""Loading compiled directories: what is checked before anything is run, and random weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small import SIZES, compiled, model, prompts

import dslc
from backends.pytorch import memory
from backends.pytorch.inputs import InputError
from backends.pytorch.weights import initialise
from compiler.manifest import ManifestError, digest
from compiler.tensors import Pattern


@pytest.fixture
def directory(tmp_path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(compiled(), tmp_path / "compiled"))


def edit(directory: Path, change) -> None:
    file = directory / "manifest.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def complaint(directory: Path, **options: object) -> str:
    with pytest.raises(ManifestError) as caught:
        dslc.load(directory, **options)
    message = str(caught.value).replace(str(directory), "DIR")
    assert "\n" not in message
    return message


# -- the directory --------------------------------------------------------------------------------


def test_what_a_directory_holds():
    files = {path.name for path in compiled().iterdir()}
    assert files == {"manifest.json", "graph.txt", "source.txt", "model.py"}
    manifest = json.loads((compiled() / "manifest.json").read_text())
    assert manifest["files"].keys() == files - {"manifest.json"}
    assert manifest["constants"]["hidden"] == SIZES["hidden"]
    assert manifest["passes"][0] == "elaborate"
    assert "models/dsv3.arch" in [source["name"] for source in manifest["sources"]]
    rows = {row["path"]: row for row in manifest["parameters"] if "{1}" in row["path"]}
    assert rows["layers[{0}].mlp.expert[{1}].W_up"] == {
        "path": "layers[{0}].mlp.expert[{1}].W_up",
        "tensor": "model.layers.{0}.mlp.experts.{1}.up_proj.weight",
        "ranges": [[1, 3], [0, 6]],
        "dims": ["f", "d"],
        "shape": [8, 20],
        "layout": "row-major",
        "format": "act",
        "stored": None,
        "shard": None,
        "dealt": None,
        "role": "param",
        "initial": "matrix",
        "entries": ["main", "mtp"],
    }
    assert manifest["caches"][0]["shape"] == [7]


def test_a_changed_file_is_not_run(directory):
    code = directory / "model.py"
    code.write_text(code.read_text() + "\nraise SystemExit('was run')\n")
    message = complaint(directory)
    assert message.startswith("DIR/model.py is not the file that was compiled (SHA-256 ")


def test_a_missing_file_is_told(directory):
    (directory / "graph.txt").unlink()
    assert complaint(directory) == "DIR/graph.txt cannot be read: No such file or directory"


def test_no_directory_and_no_manifest(tmp_path, directory):
    assert complaint(tmp_path / "x") == "DIR is not a compiled model: there is no such directory"
    (directory / "manifest.json").unlink()
    assert complaint(directory) == "DIR is not a compiled model: no manifest.json in it"


def test_a_later_abi_is_refused_by_name(directory):
    edit(directory, lambda m: m.update(abi=2, dslc="7.1", parameters="of another form"))
    expected = "DIR was compiled by dslc 7.1 with ABI 2; this dslc reads ABI 1: compile it again"
    assert complaint(directory) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("caches"), "caches: Field required"),
        (lambda m: m["parameters"][3].update(shape="wide"), "parameters.3.shape: Input should be"),
        (lambda m: m["parameters"][0].update(shape=[-1]), "parameters.0.shape.0: Input should be"),
        (lambda m: m["files"].update({"../x": "0" * 64}), "file name '../x' leaves the directory"),
        (lambda m: m["files"].update({"/x": "0" * 64}), "file name '/x' leaves the directory"),
        (lambda m: m["files"].update({"model.py": "?"}), "files.model.py: String should match"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda m: m.update(backend="mlir"), "was compiled for the backend 'mlir'"),
    ],
)
def test_a_manifest_that_is_none_is_refused(directory, change, message):
    edit(directory, change)
    assert message in complaint(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000])
def test_a_manifest_that_is_no_json_is_refused(directory, text):
    (directory / "manifest.json").write_text(text)
    assert complaint(directory).startswith("DIR")


def test_code_that_disagrees_with_the_manifest_is_refused(directory):
    def change(manifest):
        row = next(r for r in manifest["parameters"] if r["path"] == "head")
        row["shape"] = [50, 20]

    edit(directory, change)
    assert "disagree on head: [51, 20] and [50, 20]" in complaint(directory)


def test_loading_leaves_the_directory_as_it_is(directory):
    before = sorted(directory.rglob("*"))
    dslc.load(directory)
    assert sorted(directory.rglob("*")) == before


def test_no_memory_for_the_weights(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda _: 9_000)
    with pytest.raises(memory.MemoryNeeded, match=r"weights needs [\d.,]+ KB; cpu has 9,000 B ava"):
        dslc.load(compiled())


def test_this_machine_says_how_much_memory_it_has():
    assert 1e6 < memory.available(torch.device("cpu")) < 1e15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8': a model runs in float32, bfloat16, float16"),
        ({"device": "cuda:77"}, "device 'cuda:77': "),
        ({"device": "abacus"}, "device 'abacus': "),
    ],
)
def test_no_such_dtype_or_device(options, message):
    with pytest.raises(InputError) as caught:
        dslc.load(compiled(), **options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# -- the module -----------------------------------------------------------------------------------


def test_parameters_go_by_the_checkpoints_names():
    named = dict(model().named_parameters())
    states = model().state_dict().keys() - named.keys()
    assert states == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2, 3)}
    assert len(list(model().parameters())) == len(named)
    assert "part.model.norm.weight" in dict(model().named_parameters("part"))


def test_a_state_dict_of_other_names_or_shapes_is_refused():
    fresh = dslc.load(compiled())
    state = fresh.state_dict()
    state["lm_haed.weight"] = state.pop("lm_head.weight")
    with pytest.raises(InputError, match=r"lm_head\.weight: missing") as caught:
        fresh.load_state_dict(state)
    assert "lm_haed.weight: not one of the model's" in str(caught.value)
    result = fresh.load_state_dict(state, strict=False)
    assert result.missing_keys == ["lm_head.weight"]
    assert result.unexpected_keys == ["lm_haed.weight"]
    state["model.norm.weight"] = torch.ones(3)
    with pytest.raises(InputError, match=r"model.norm.weight: expected \[20\], found \[3\]"):
        fresh.load_state_dict(state, strict=False)


def test_a_model_can_be_part_of_another_and_be_moved():
    outer = torch.nn.ModuleDict({"lm": dslc.load(compiled())})
    assert "lm.lm_head.weight" in outer.state_dict()
    outer.to(torch.bfloat16)
    assert outer["lm"](prompts(1, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trace_gives_what_the_source_names(dtype):
    tokens = prompts(2, 5)
    traced = dslc.load(compiled(), dtype=dtype).trace(["layers[2].attn.k", "logits"], tokens)
    assert traced["layers[2].attn.k"].shape == (2, 5, 2, 5)  # s, h, n: a let, gone from graph.txt
    assert traced["logits"].shape == (2, 5, SIZES["vocab"])
    close = {"float32": 1e-5, "bfloat16": 0.2}[dtype]
    assert torch.allclose(traced["logits"].float(), model()(tokens), atol=close)


# -- random weights -------------------------------------------------------------------------------


def pattern(name: str, *shape: int, initial: str = "matrix") -> Pattern:
    return Pattern(name, name, (), shape, ("d",) * len(shape), "act", "param", initial, ("main",))


def values(pattern: Pattern, *range_: int, seed: int = 0) -> np.ndarray:
    return initialise.values(next(pattern.tensors()), seed, *range_)


def test_values_are_the_same_on_every_machine():
    expected = "23326756e92351e0"
    found = digest(values(pattern("a.weight", 30, 40)).astype("<f4").tobytes())[:16]
    assert found == expected


def test_values_follow_seed_and_name_alone():
    a = values(pattern("a", 30, 40))
    assert np.array_equal(a, values(pattern("a", 30, 40)))
    assert not np.array_equal(a, values(pattern("b", 30, 40)))
    assert not np.array_equal(a, values(pattern("a", 30, 40), seed=1))
    for start, stop in ((0, 7), (1, 8), (333, 1200)):  # a rank may draw its own rows only
        assert np.array_equal(a.ravel()[start:stop], values(pattern("a", 30, 40), start, stop))


def test_values_suit_what_a_tensor_does():
    matrix = values(pattern("a", 500, 100))
    assert abs(matrix.std() - 0.1) < 1e-3 and abs(matrix.mean()) < 1e-3
    gain = values(pattern("a", 1000, initial="gain"))
    assert gain.min() >= 0.9 and gain.max() <= 1.1
    assert abs(values(pattern("a", 1000, initial="shift"))).max() <= 0.05
    assert abs(values(pattern("a", 1000, initial="state"))).max() <= 0.01


def test_weights_do_not_depend_on_dtype_or_threads(monkeypatch):
    monkeypatch.setattr(initialise, "CHUNK", 7)
    narrow = dslc.load(compiled(), dtype="bfloat16").state_dict()
    for name, tensor in model().state_dict().items():
        assert torch.equal(tensor.to(narrow[name].dtype), narrow[name]), name
    other = dslc.load(compiled(), seed=1).state_dict()
    assert not torch.equal(other["lm_head.weight"], model().state_dict()["lm_head.weight"])
