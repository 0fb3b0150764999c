"""Checkpoints: read exactly, and refused with one message that names everything that is wrong."""

import json
import os
from pathlib import Path

import pytest
import torch
from small import SIZES, compiled, weights, write, write_shards

import dslc
from backends.pytorch.weights.checkpoint import CheckpointError
from backends.pytorch.weights.fill import dequantise

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
NORM = "model.norm.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
UP = "model.layers.2.mlp.experts.3.up_proj.weight"


def load(folder: Path, **options: object):
    return dslc.load(compiled(), folder, **{"dtype": "float32", **options})


def complaint(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value).replace(str(folder), "CKPT")


# -- what is right --------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_once_to_the_dtype_of_the_run(tmp_path, stored, run):
    kept = {n: t.to(stored) for n, t in weights().items()}
    loaded = load(write(tmp_path / "c", kept), dtype=run).state_dict()
    assert loaded.keys() == kept.keys()
    for name, tensor in loaded.items():
        state = name.endswith("bias")  # declared f32 in the source
        assert tensor.dtype == (torch.float32 if state else run)
        assert torch.equal(tensor, kept[name].to(tensor.dtype)), name


def test_shards_and_one_file_are_the_same(tmp_path):
    one, many = write(tmp_path / "one", weights()), write_shards(tmp_path / "many", weights())
    a, b = load(one).state_dict(), load(many).state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_the_dtype_is_the_checkpoints_unless_given(tmp_path):
    folder = write(tmp_path / "c", weights(), torch_dtype="bfloat16")
    assert load(folder, dtype=None).dtype == torch.bfloat16
    assert load(folder, dtype="float32").dtype == torch.float32


def test_links_of_a_download_cache_are_followed(tmp_path):
    folder = write(tmp_path / "c", weights())
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    load(folder)


def fp8(tensor: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    return tensor.to(torch.float8_e4m3fn), scales


def with_fp8(tmp_path: Path, **config: object):
    """A checkpoint with one block-scaled weight, partial blocks at both edges; its two tensors."""
    kept = weights()
    stored, scales = fp8(kept[O_PROJ], 8, 5)  # [20, 12] in blocks of [8, 5]
    kept[O_PROJ], kept[O_PROJ + "_scale_inv"] = stored, scales
    config = config or {"quantization_config": {"weight_block_size": [8, 5]}}
    return write(tmp_path / "fp8", kept, **config), stored, scales


@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16])
def test_block_scaled_fp8_is_dequantised_exactly(tmp_path, run):
    folder, stored, scales = with_fp8(tmp_path)
    loaded = load(folder, dtype=run).state_dict()[O_PROJ]
    for i in range(stored.shape[0]):
        for j in range(stored.shape[1]):
            exact = stored[i, j].float() * scales[i // 8, j // 5]
            assert loaded[i, j] == exact.to(run)


def test_a_block_may_be_larger_than_the_matrix():
    weight, into = torch.ones(3, 5).to(torch.float8_e4m3fn), torch.empty(3, 5)
    dequantise(weight, torch.tensor([[2.5]]), (128, 128), into)
    assert torch.equal(into, torch.full((3, 5), 2.5))


def test_tensors_that_nobody_needs_are_noted(tmp_path):
    kept = weights() | {"model.rotary.inv_freq": torch.ones(4)}
    with pytest.warns(UserWarning, match=r"a tensor that the model does not use: model\.rotary"):
        load(write(tmp_path / "c", kept))


def test_second_copies_that_the_source_ignores_are_not_noted(tmp_path, recwarn):
    kept = weights() | {"model.layers.3.embed_tokens.weight": torch.ones(1)}
    load(write(tmp_path / "c", kept))
    assert not recwarn


def test_an_entry_whose_tensors_are_missing_is_not_available(tmp_path):
    kept = {n: t for n, t in weights().items() if ".layers.3." not in n}
    told: list[str] = []
    model = load(write(tmp_path / "c", kept), note=told.append)
    assert len(told) == 1 and "'mtp' is not available" in told[0] and "more" in told[0]
    assert model.state_dict().keys() == kept.keys()
    assert sum(p.numel() for p in model.parameters()) < sum(t.numel() for t in weights().values())
    tokens = torch.tensor([[1, 2, 3]])
    model(tokens)
    with pytest.raises(dslc.UserError, match=r"'mtp' is not available: the checkpoint lacks model"):
        model.mtp(tokens)


def test_a_config_of_other_constants_is_noted(tmp_path):
    folder = write(tmp_path / "c", weights(), rms_norm_eps=0.5, hidden_size=SIZES["hidden"])
    with pytest.warns(UserWarning, match=r"rms_norm_eps is 0\.5, compiled for 1e-06"):
        load(folder)


# -- what is wrong --------------------------------------------------------------------------------


def edited(tmp_path: Path, change) -> Path:
    """A checkpoint whose tensors have been changed."""
    kept = weights()
    change(kept)
    return write(tmp_path / "c", kept)


def rename(old: str, new: str):
    return lambda kept: kept.update({new: kept.pop(old)})


TENSORS = {
    "missing": (lambda kept: kept.pop(UP), f"{UP}: missing, expected [8, 20]"),
    "misnamed": (
        rename(HEAD, "lm_haed.weight"),
        f"{HEAD}: missing, expected [51, 20]; is it 'lm_haed.weight' [51, 20]?",
    ),
    "transposed": (
        lambda kept: kept.update({UP: kept[UP].T}),
        f"{UP}: expected [8, 20], found [20, 8]",
    ),
    "flat": (
        lambda kept: kept.update({UP: kept[UP].flatten()}),
        f"{UP}: expected [8, 20], found [160]",
    ),
    "integers": (
        lambda kept: kept.update({EMBED: kept[EMBED].long()}),
        f"{EMBED}: expected F32, BF16, F16 or F8_E4M3, found I64",
    ),
    "float64": (
        lambda kept: kept.update({NORM: kept[NORM].double()}),
        f"{NORM}: expected F32, BF16, F16 or F8_E4M3, found F64",
    ),
    "FP8 of another kind": (
        lambda kept: kept.update({UP: kept[UP].to(torch.float8_e5m2)}),
        f"{UP}: expected F32, BF16, F16 or F8_E4M3, found F8_E5M2",
    ),
    "FP8 without a block size": (
        lambda kept: kept.update({UP: kept[UP].to(torch.float8_e4m3fn)}),
        f"{UP}: is FP8, but config.json has no quantization_config.weight_block_size [R, C]",
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_wrong_tensor_is_told_with_what_was_expected(tmp_path, kind):
    change, line = TENSORS[kind]
    lines = complaint(edited(tmp_path, change)).splitlines()
    assert lines[0] == "the checkpoint in CKPT does not fit the model: 1 thing is wrong"
    assert lines[1] == f"  {line}"


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    def change(kept):
        for wrong, _ in list(TENSORS.values())[:6]:
            if wrong is not TENSORS["transposed"][0] and wrong is not TENSORS["flat"][0]:
                wrong(kept)
        kept["foo"] = torch.ones(1)

    message = complaint(edited(tmp_path, change))
    assert message.splitlines()[0].endswith("4 things are wrong")
    for kind in ("missing", "misnamed", "integers", "float64"):
        assert TENSORS[kind][1] in message
    assert message.splitlines()[-1] == "  not used: foo, lm_haed.weight"


def test_tensors_alike_share_a_line(tmp_path):
    def drop(kept):
        for name in [n for n in kept if "experts" in n and ".down_proj" in n]:
            if "shared" not in name:
                del kept[name]

    with pytest.raises(CheckpointError) as caught:
        load(edited(tmp_path, drop))
    missing = "missing, expected [20, 8]"
    name = "model.layers.{1..2}.mlp.experts.{0..5}.down_proj.weight"
    assert f"\n  {name} (12): {missing}" in str(caught.value)
    assert len(caught.value.problems) == 12
    assert ("model.layers.2.mlp.experts.5.down_proj.weight", missing) in caught.value.problems


def test_many_problems_stay_readable(tmp_path):
    """Another width: nearly every tensor is wrong, and the reason is told first."""
    dslc.compile("dsv3", set={**SIZES, "hidden": 22}).save(tmp_path / "wide")
    other = dslc.load(tmp_path / "wide").state_dict()
    message = complaint(write(tmp_path / "c", other, hidden_size=22))
    assert "hidden_size is 22, compiled for 20" in message.splitlines()[0]
    assert f"{HEAD}: expected [51, 20], found [51, 22]" in message and len(message) < 2000


def cut(keep: int):
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])

    return change


def cut_last(folder: Path) -> None:
    cut((folder / "model.safetensors").stat().st_size - 10)(folder)


def put(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def header(fields: object, data: int = 0):
    """A file with this header, and so many bytes of data."""

    def change(folder: Path) -> None:
        text = (fields if isinstance(fields, str) else json.dumps(fields)).encode()
        file = len(text).to_bytes(8, "little") + text + bytes(data)
        (folder / "model.safetensors").write_bytes(file)

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def twice(folder: Path) -> None:
    file = folder / "model.safetensors"
    (folder / "a.safetensors").write_bytes(file.read_bytes())
    file.rename(folder / "b.safetensors")


def folder_or_pipe(make):
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make(folder / "model.safetensors")

    return change


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FILES = {
    "empty file": (cut(0), "model.safetensors: the file ends within its header (0 bytes)"),
    "half a header": (cut(2000), "model.safetensors: the file ends within its header (2,000"),
    "cut off": (cut_last, "cut off: expected bytes "),
    "a page of HTML": (put("model.safetensors", "<html>" * 9), "the file ends within its header"),
    "no JSON": (header("{'"), "model.safetensors: the header is not JSON"),
    "no object": (header("[]"), "model.safetensors: the header is not an object"),
    "deep JSON": (header("[" * 90_000), "model.safetensors: the header is not JSON"),
    "no offsets": (header({"a": {"dtype": "F32", "shape": []}}), "entry of 'a' lacks dtype, shape"),
    "negative": (header({"a": {**ONE, "shape": [-2]}}), "entry of 'a' has negative sizes"),
    "backwards": (header({"a": {**ONE, "data_offsets": [8, 0]}}), "entry of 'a' has negative"),
    "lies": (header({"a": {**ONE, "shape": [3]}}), "gives 'a' 8 bytes, which is not F32 [3]"),
    "in two files": (twice, "b.safetensors: 'lm_head.weight' is in a.safetensors as well"),
    "folder": (folder_or_pipe(os.mkdir), "model.safetensors: this is not a file"),
    "pipe": (folder_or_pipe(os.mkfifo), "model.safetensors: this is not a file"),
    "pickles only": (pickled, "no *.safetensors in CKPT (pytorch_model.bin is a pickle, which"),
    "config": (put("config.json", "{"), "CKPT/config.json is not JSON"),
    "config list": (put("config.json", "[]"), "config.json: expected an object, found list"),
    "no index": (put("model.safetensors.index.json", "{}"), "'weight_map' does not map tensors"),
    "index to numbers": (
        put("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        "'weight_map' does not map tensors to files",
    ),
    "missing shard": (
        put("model.safetensors.index.json", '{"weight_map": {"a": "x.safetensors"}}'),
        "x.safetensors: No such file or directory",
    ),
    "index of another": (
        put(
            "model.safetensors.index.json",
            json.dumps({"weight_map": {HEAD: "model.safetensors", "b": "model.safetensors"}}),
        ),
        None,  # an index that lacks tensors of its files is none the worse
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_is_told(tmp_path, kind):
    break_it, line = FILES[kind]
    folder = write(tmp_path / "c", weights())
    break_it(folder)
    if line is None:
        load(folder)
        return
    lines = complaint(folder).splitlines()
    assert line in lines[-1] or kind == "missing shard"
    assert len(lines) <= 2 or kind == "missing shard"  # not each tensor of a file that is broken


def test_a_tensor_that_its_file_does_not_hold(tmp_path):
    folder = write_shards(tmp_path / "c", weights())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    there = index[HEAD]
    other = next(file for file in index.values() if file != there)
    (folder / there).unlink()
    kept = {n: t for n, t in weights().items() if index[n] == there and n != HEAD}
    write(folder, kept)
    (folder / "model.safetensors").rename(folder / there)
    assert f"{HEAD}: missing, expected [51, 20]; the index says {there}" in complaint(folder)
    assert other not in complaint(folder)


@pytest.mark.parametrize("path", ["../out.safetensors", "/tmp/out.safetensors", "a/../../b", ""])
def test_an_index_may_not_leave_its_folder(tmp_path, path):
    folder = write(tmp_path / "c", weights())
    index = {"weight_map": {HEAD: path, NORM: "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{path}: the index names a file outside of the checkpoint's folder" in complaint(folder)


def scales(change):
    """A checkpoint with FP8 whose scales have been changed."""

    def build(tmp_path: Path) -> Path:
        folder, stored, scale = with_fp8(tmp_path)
        kept = weights() | {O_PROJ: stored}
        config = json.loads((folder / "config.json").read_text())
        changed = change(scale)
        if changed is not None:
            kept[O_PROJ + "_scale_inv"] = changed
        return write(folder, kept, **config)

    return build


SCALES = {
    "missing": (lambda s: None, f"is FP8, but its scales '{O_PROJ}_scale_inv' are missing"),
    "shape": (
        lambda s: s[:, :2],
        f"'{O_PROJ}_scale_inv': expected F32 [3, 3], found F32 [3, 2]",
    ),
    "dtype": (
        lambda s: s.bfloat16(),
        f"'{O_PROJ}_scale_inv': expected F32 [3, 3], found BF16 [3, 3]",
    ),
    "NaN": (
        lambda s: s.masked_fill(s == s.max(), torch.nan),
        f"'{O_PROJ}_scale_inv': 1 of its scales is NaN or infinite",
    ),
    "infinite": (lambda s: s / 0, f"'{O_PROJ}_scale_inv': 9 of its scales are NaN or infinite"),
}


@pytest.mark.parametrize("kind", SCALES)
def test_wrong_scales_are_told(tmp_path, kind):
    change, line = SCALES[kind]
    assert complaint(scales(change)(tmp_path)).splitlines()[1] == f"  {O_PROJ}: {line}"


def test_no_such_folder(tmp_path):
    assert complaint(tmp_path / "nothing") == "there is no checkpoint folder CKPT"
