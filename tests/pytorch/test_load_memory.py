"""Loading takes the memory of the model and of one tensor: sampled in fresh processes, which have
no memory left over from other work to hide in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dslc
from dslc import cli

ROOT = Path(__file__).resolve().parent.parent.parent
# Many tensors of a quarter of a MB: what a copy of each would leave behind adds up.
SIZES = {
    "hidden": 256, "vocab": 2048, "layers": 3, "ffn": 512, "heads": 4, "q_rank": 64, "kv_rank": 64,
    "nope": 32, "rope": 16, "value": 32, "experts": 48, "groups": 4, "expert_ffn": 512,
}  # fmt: skip
SETTINGS = [f"--set={name}={value}" for name, value in SIZES.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of one model: float32, bfloat16 and FP8."""
    folder = tmp_path_factory.mktemp("memory")
    for stored, options in (
        ("float32", ["--dtype=float32"]), ("bfloat16", []), ("fp8", ["--deploy=fp8"]),
    ):  # fmt: skip
        assert cli.run(["init", str(folder / stored), "dsv3", *SETTINGS, *options]) == 0
    dslc.compile("dsv3", set=SIZES).save(folder / "compiled")
    return folder


@pytest.mark.parametrize(
    ("stored", "run"),
    [
        ("bfloat16", "bfloat16"),
        ("float32", "bfloat16"),
        ("fp8", "bfloat16"),
    ],
)
def test_a_model_and_one_tensor(folder, stored, run):
    script, compiled = ROOT / "benchmarks" / "load_memory.py", folder / "compiled"
    command = [sys.executable, script, "--child", "dslc", compiled, folder / stored, run]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout)
    model, tensor = found["model"], 2 * found["largest_tensor"]  # as stored, in f32 at most
    assert model > 40e6 > 10 * tensor
    # Tensors this small also go where the imports' freed memory lay, which is resident already (5
    # MB and more on some machines): the lower bound only holds that the loading was seen at all.
    assert 0.7 * model < found["peak_anonymous"] < model + tensor + 7e6
    assert found["peak_file_backed"] < 20e6
