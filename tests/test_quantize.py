"""dslc quantize: to the published FP8 form and back, every code unchanged; what it refuses."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dslc.cli import run
from oracle.checkpoint import read_tensors, write_checkpoint
from oracle.fp8 import is_fp8, quantise, to_fp8

SHAPE = {"hidden_size": 141, "intermediate_size": 131, "num_hidden_layers": 2, "vocab_size": 33}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BF16 checkpoint, the same in FP8, that in BF16, and that in FP8 again."""
    folder = tmp_path_factory.mktemp("quantize")
    write_checkpoint(folder / "bf16", dtype=torch.bfloat16, **SHAPE)
    (folder / "bf16" / "tokenizer.json").write_text("{}")
    assert run(["quantize", str(folder / "bf16"), str(folder / "fp8")]) == 0
    assert run(["quantize", str(folder / "fp8"), str(folder / "back"), "--to", "bf16"]) == 0
    assert run(["quantize", str(folder / "back"), str(folder / "again")]) == 0
    return folder


def test_the_published_form(folder):
    """Tile by tile what the oracle writes, and nothing else is touched."""
    before, after = read_tensors(folder / "bf16"), read_tensors(folder / "fp8")
    for name, tensor in before.items():
        if not is_fp8(name):
            assert torch.equal(after[name], tensor), name
            continue
        codes, scales, _ = quantise(tensor, (128, 128))
        assert torch.equal(after[name].view(torch.uint8), codes.view(torch.uint8)), name
        assert torch.equal(after[f"{name}_scale_inv"], scales), name
    expected = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config = json.loads((folder / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == expected | {"weight_block_size": [128, 128]}
    assert (folder / "fp8" / "tokenizer.json").read_text() == "{}"


def test_there_and_back_every_code_is_unchanged(folder):
    first, second = read_tensors(folder / "fp8"), read_tensors(folder / "again")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if name.endswith("_scale_inv"):
            assert torch.allclose(second[name], tensor, rtol=2**-8, atol=0), name
        else:
            assert torch.equal(second[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_in_bf16_it_is_what_the_codes_stand_for(folder):
    codes, wide = read_tensors(folder / "fp8"), read_tensors(folder / "back")
    assert not any(name.endswith("_scale_inv") for name in wide)
    assert "quantization_config" not in json.loads((folder / "back" / "config.json").read_text())
    for name, tensor in wide.items():
        if is_fp8(name):
            spread = codes[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            rows, columns = tensor.shape
            exact = codes[name].float() * spread[:rows, :columns]
            assert torch.equal(tensor, exact.bfloat16()), name


def test_one_byte_and_scales_stay_in_memory(folder):
    """A published checkpoint's own bytes; a BF16 one is quantised to the same as it is read."""
    import dslc

    dslc.compile("dsv3", checkpoint=str(folder / "fp8"), deploy="fp8").save(folder / "compiled")
    models = [
        dslc.load(folder / "compiled", checkpoint=folder / which) for which in ("fp8", "bf16")
    ]
    stored = read_tensors(folder / "fp8")
    kept = 0
    for name, weight in models[0].named_parameters():
        if is_fp8(name):
            for model in models:
                own = dict(model.named_parameters())[name]
                assert torch.equal(own.codes.view(torch.uint8), stored[name].view(torch.uint8))
                assert torch.equal(own.scale, stored[f"{name}_scale_inv"])
            kept += weight.codes.nbytes + weight.scale.nbytes
    assert 0 < kept < 1.1 * sum(t.numel() for n, t in stored.items() if is_fp8(n))
    tokens = torch.tensor([[1, 5, 9, 2]])
    assert torch.equal(models[0](tokens), models[1](tokens))


def test_blocks_of_another_size_are_quantised_anew(folder, tmp_path):
    import dslc

    to_fp8(folder / "bf16", tmp_path / "small", tile=(32, 48))
    if not (folder / "compiled").exists():
        dslc.compile("dsv3", checkpoint=str(folder / "fp8"), deploy="fp8").save(folder / "compiled")
    model = dslc.load(folder / "compiled", checkpoint=tmp_path / "small")
    meant = read_tensors(tmp_path / "small-dequantised")
    for name, weight in model.named_parameters():
        if is_fp8(name):
            codes, scales, _ = quantise(meant[name], (128, 128))
            assert torch.equal(weight.codes.view(torch.uint8), codes.view(torch.uint8)), name
            assert torch.equal(weight.scale, scales), name


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of a checkpoint with some tensors changed, and what the command says of it."""

    def say(capsys, which, change, *options, config=None):
        path = tmp_path / "broken"
        shutil.copytree(folder / which, path)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            known = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(known | config))
        assert run(["quantize", str(path), str(tmp_path / "out"), *options]) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["broken"]  # nothing half-written
        return capsys.readouterr().err.replace(str(path), "DIR")

    return say


WEIGHT = "model.layers.0.mlp.up_proj.weight"


def test_scales_of_the_wrong_shape_are_named(broken, capsys):
    def change(tensors):
        tensors[f"{WEIGHT}_scale_inv"] = torch.ones(3, 1)

    said = broken(capsys, "fp8", change, "--to", "bf16")
    assert said == (
        "error: the checkpoint in DIR cannot be converted: 1 thing is wrong\n"
        f"  {WEIGHT}: '{WEIGHT}_scale_inv': expected F32 [2, 2], found F32 [3, 1]\n"
    )


SCALES = {
    float("nan"): "is NaN or infinite",
    -1e-3: "is negative, which no quantiser writes",
    1e36: "is so large that weights would be infinite",
}


@pytest.mark.parametrize("scale", SCALES)
def test_scales_that_no_quantiser_writes_are_named(broken, capsys, scale):
    def change(tensors):
        tensors[f"{WEIGHT}_scale_inv"][1, 0] = scale

    said = broken(capsys, "fp8", change, "--to", "bf16")
    assert said.partition("\n")[2] == (
        f"  {WEIGHT}: '{WEIGHT}_scale_inv': 1 of its scales {SCALES[scale]}\n"
    )


@pytest.mark.parametrize("to", ["fp8", "bf16"])
def test_scales_of_a_weight_that_is_not_e4m3_are_named(broken, capsys, to):
    """Copied as they are, weight and scales would be part of neither form."""

    def change(tensors):
        tensors[WEIGHT] = tensors[WEIGHT].to(torch.bfloat16)

    said = broken(capsys, "fp8", change, "--to", to)
    assert said == (
        "error: the checkpoint in DIR cannot be converted: 1 thing is wrong\n"
        f"  {WEIGHT}: has scales '{WEIGHT}_scale_inv', but is BF16 [131, 141], not F8_E4M3\n"
    )


def test_a_scale_of_zero_stands_for_zeros(folder, tmp_path):
    """As some quantisers write it for a tile of zeros."""
    path = tmp_path / "zero"
    shutil.copytree(folder / "fp8", path)
    tensors = load_file(path / "model.safetensors")
    tensors[f"{WEIGHT}_scale_inv"][0, 0] = 0.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert run(["quantize", str(path), str(tmp_path / "out"), "--to", "bf16"]) == 0
    weight = load_file(tmp_path / "out" / "model.safetensors")[WEIGHT]
    assert not weight[:128, :128].any() and weight[128:].any()


def test_a_file_that_was_cut_off_is_named(folder, tmp_path, capsys):
    path = tmp_path / "cut"
    shutil.copytree(folder / "fp8", path)
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert run(["quantize", str(path), str(tmp_path / "out"), "--to", "bf16"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: the checkpoint in {path} cannot be converted: 1 thing is wrong")
    assert "cut off: expected bytes" in said and not (tmp_path / "out").exists()


def test_missing_scales_are_named(broken, capsys):
    said = broken(capsys, "fp8", lambda t: t.pop(f"{WEIGHT}_scale_inv"), "--to", "bf16")
    assert f"{WEIGHT}: is FP8, but its scales '{WEIGHT}_scale_inv' are missing" in said


def test_weights_that_no_scale_fits_are_named(broken, capsys):
    def change(tensors):
        tensors[WEIGHT][1, 2] = torch.nan

    said = broken(capsys, "bf16", change)
    assert f"{WEIGHT}: holds NaN or infinite numbers, which no scale fits" in said


def test_a_tensor_of_another_shape_is_named(broken, capsys):
    def change(tensors):
        tensors[WEIGHT] = tensors[WEIGHT][:-1].clone()

    assert f"{WEIGHT}: expected [131, 141], found [130, 141]" in broken(capsys, "bf16", change)


def test_what_is_fp8_already_is_said(folder, tmp_path, capsys):
    assert run(["quantize", str(folder / "fp8"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: {folder / 'fp8'} is in FP8 already\n"
    assert run(["quantize", str(folder / "bf16"), str(tmp_path / "out"), "--to", "bf16"]) == 1
    assert capsys.readouterr().err == f"error: {folder / 'bf16'} holds no FP8 weights\n"


def test_a_model_that_no_shipped_file_describes(broken, capsys):
    said = broken(capsys, "bf16", lambda t: None, config={"model_type": "unheard_of"})
    assert said == (
        "error: shipped models that fit the checkpoint: none; --file names an .arch file\n"
    )


def test_a_directory_that_holds_something_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert run(["quantize", str(folder / "bf16"), str(tmp_path)]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# -- compare ---------------------------------------------------------------------------------------


def test_compare_tells_what_the_deployment_does(folder, tmp_path, capsys):
    for name, options in (("plain", []), ("cast", ["--deploy", "fp8"])):
        given = ["compile", "dsv3", "--checkpoint", str(folder / "bf16"), *options]
        assert run([*given, "-o", str(tmp_path / name)]) == 0
    capsys.readouterr()
    pair = [str(tmp_path / "plain"), str(tmp_path / "cast")]
    given = ["compare", *pair, "--checkpoint", str(folder / "bf16")]
    assert run([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantised"].endswith("cast")
    assert {e["path"] for e in found["layers"]} == {"layers[0]", "layers[1]"}
    errors = {e["path"]: e["error"] for e in found["contractions"]}
    assert "layers[1].mlp.shared.W_up" in errors and "layers[0].attn.W_o" in errors
    assert all(0.005 < error < 0.06 for error in errors.values()), errors  # few and short rows
    assert 0 < found["kl"][0] <= found["kl"][1] and found["decisions"] == 16 * 3
    assert run(given) == 0
    said = capsys.readouterr().out
    assert "contraction alone" in said and "running freely: logits" in said
