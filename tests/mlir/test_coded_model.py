"""A deployment with FP8 weights, in one module: what the PyTorch backend gives for it.

A rounding that falls the other way is a step of E4M3, 6% of a value, and everything behind it is
another number: so nearly all rows are equal, not all.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import dslc
from backends.mlir.model import Model, load
from backends.pytorch.weights.tensorfile import Reader, read_header
from dslc.cli import run
from mlir.compiled import CODED, compiled, folder, model, reference

pytest.importorskip("iree.compiler")
pytest.importorskip("iree.runtime")

SAME, SHARE = 1e-5, 0.75


def tokens(batch: int, time: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CODED["dsv3"]["vocab"], (batch, time))


def equal_rows(found: np.ndarray, expected: np.ndarray) -> list[bool]:
    return (np.abs(found - expected).max(-1) <= SAME * np.abs(expected).max()).ravel().tolist()


def compared(ours: Model, theirs: torch.nn.Module) -> list[bool]:
    """Whether each row of logits is equal: several lengths and batches, prefill and decode."""
    same = []
    for lengths in [(1,), (7,), (5, 3, 1), (33, 12), (2, 9)]:
        given = tokens(len(lengths), max(lengths))
        with torch.no_grad():
            expected = theirs(torch.tensor(given), torch.tensor(lengths)).numpy()
        found = ours(given, lengths)
        for row, length in enumerate(lengths):
            same += equal_rows(found[row, :length], expected[row, :length])
    for batch in (1, 3):
        mine, its = ours.new_cache(batch, 40), theirs.new_cache(batch)
        for step, time in enumerate((6, 1, 1, 1, 3, 1)):
            given = tokens(batch, time, seed=step)
            with torch.no_grad():
                expected = theirs(torch.tensor(given), cache=its).numpy()
            same += equal_rows(ours(given, cache=mine), expected)
    return same


def test_logits() -> None:
    same = compared(model("dsv3", deploy="fp8"), reference("dsv3", deploy="fp8"))
    assert np.mean(same) >= SHARE


def test_weights_are_stored_in_one_byte() -> None:
    rows = model("dsv3", deploy="fp8").layout.weights
    experts = rows["layers[0:2].mlp.expert[0:6].W_gate"]
    assert (experts.element, experts.shape) == ("f8E4M3FN", (2, 6, 10, 256, 16))
    scales = rows["layers[0:2].mlp.expert[0:6].W_gate:scales"]
    assert (scales.element, scales.shape) == ("f32", (2, 6, 10, 2))
    kinds = {key: row for key, row in rows.items() if row.element == "f8E4M3FN"}
    assert {bool(row.lanes) for row in kinds.values()} == {True, False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the published FP8 form; what is not in FP8 is float32, as numbers of few bits meet in
    exact ties, which the last bit of a norm decides."""
    where = tmp_path_factory.mktemp("coded") / "checkpoint"
    sets = [f"--set={key}={value}" for key, value in CODED["dsv3"].items()]
    options = ["--dims", "small", "--deploy", "fp8", "--dtype", "float32", *sets]
    assert run(["init", str(where), "dsv3", *options]) == 0
    return where


def test_an_fp8_checkpoint_is_laid_out_byte_for_byte(checkpoint: Path, tmp_path: Path) -> None:
    ours = load(compiled("dsv3", deploy="fp8"), checkpoint)
    assert ours.session.mapped is not None
    folder_of_torch = folder() / "dsv3-torch-float32-fp8"
    reference("dsv3", deploy="fp8")  # compiles it
    assert np.mean(compared(ours, dslc.load(folder_of_torch, checkpoint, dtype="float32"))) >= SHARE
    held = read_header(ours.session.mapped)["layers[0:2].mlp.expert[0:6].W_up"]
    assert held.dtype == "F8_E4M3"
    stored = read_header(checkpoint / "model.safetensors")
    codes = np.empty(held.shape, np.uint8)
    with Reader() as reader:
        reader.read_bytes(held, codes.reshape(-1).data)
        for layer, expert in ((0, 0), (1, 5)):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            its = np.empty(stored[name].shape, np.uint8)
            reader.read_bytes(stored[name], its.reshape(-1).data)
            found = codes[layer, expert].swapaxes(1, 2).reshape(its.shape)
            np.testing.assert_array_equal(found, its)


FORMATS = """edition 2026
import dsv3
deploy nested of DeepSeekV3 {
  precision w(nvfp4, activations = 1 x 16, weights = 1 x 16) for MoE.expert
}
deploy wide of DeepSeekV3 { precision bf16 for contractions with a parameter }
deploy whole of DeepSeekV3 { precision w(weights = int8 1 x 32) for MoE.expert }
"""


@pytest.mark.parametrize(
    "deploy, dialect, message",
    [
        (
            "nested", "linalg",
            "std/moe.arch:87: the MLIR backend cannot compile 'quantize' here: the scales of "
            "'nvfp4' have a scale of their own",
        ),
        (
            "wide", "linalg",
            "models/dsv3.arch:77: the MLIR backend cannot compile 'param' here: codes of 'bf16' do "
            "not fit into a byte that IREE computes with",
        ),
        (
            "whole", "tosa",
            "std/ffn.arch:9: the MLIR backend cannot compile 'param' here: 'int8' is written in "
            "linalg alone",
        ),
    ],
)  # fmt: skip
def test_formats_that_are_refused(
    deploy: str, dialect: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if dialect != "linalg":
        pytest.importorskip("torch_mlir")
    file = tmp_path / "formats.arch"
    file.write_text(FORMATS)
    arguments = ["compile", str(file), "--dims", "small", "--deploy", deploy, "--emit", "mlir"]
    assert run([*arguments, "--dialect", dialect]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"
