"""Layers of two kinds in turn, an odd number of them: the example of docs/language.md, loaded from
a checkpoint that numbers them through."""

import json
import re
from pathlib import Path

import pytest
import torch
from small import write

import dslc

DOC = Path(__file__).parents[2] / "docs" / "language.md"
TENSORS = ("qkv_proj.weight", "o_proj.weight", "slope")


def compiled(folder: Path, layers: int) -> Path:
    blocks = re.findall(r"^```arch\n(.*?)^```", DOC.read_text(), re.MULTILINE | re.DOTALL)
    (text,) = [b for b in blocks if "model Hybrid" in b]
    (folder / "hybrid.arch").write_text(text)
    dslc.compile(str(folder / "hybrid.arch"), set={"layers": layers}).save(folder / "compiled")
    return folder / "compiled"


@pytest.mark.parametrize("layers", [4, 5])
def test_a_checkpoint_that_numbers_its_layers_through_is_loaded(tmp_path, layers):
    directory = compiled(tmp_path, layers)
    first = dslc.load(directory, seed=1)
    wanted = {f"model.layers.{k}.self_attn.{x}" for k in range(layers) for x in TENSORS}
    assert first.state_dict().keys() == wanted | {"model.embed_tokens.weight"}
    folder = write(tmp_path / "c", first.state_dict(), num_hidden_layers=layers)
    loaded = dslc.load(directory, folder, seed=2)
    assert loaded.state_dict().keys() == first.state_dict().keys()
    tokens = torch.arange(12).reshape(1, 12)
    assert torch.equal(loaded(tokens), first(tokens))


def test_each_layer_is_the_one_of_its_number(tmp_path):
    directory = compiled(tmp_path, 5)
    tensors = dslc.load(directory).state_dict()
    for k in range(5):
        tensors[f"model.layers.{k}.self_attn.slope"] = torch.full((4,), float(k))
    model = dslc.load(directory, write(tmp_path / "c", tensors))
    slopes = {n: float(p[0]) for n, p in model.module.named_parameters() if n.endswith("slope")}
    assert slopes == {
        "turn.0.near.slope": 0, "turn.0.far.slope": 1, "turn.1.near.slope": 2,
        "turn.1.far.slope": 3, "rest.4.slope": 4,
    }  # fmt: skip


def test_the_manifest_has_one_row_for_each_kind(tmp_path):
    rows = []
    for layers in (61, 611):
        folder = tmp_path / str(layers)
        folder.mkdir()
        manifest = json.loads((compiled(folder, layers) / "manifest.json").read_text())
        rows.append([row["tensor"] for row in manifest["parameters"]])
    assert [len(r) for r in rows] == [10, 10]
    assert "model.layers.{2 * $0 + 1}.self_attn.slope" in rows[0]
