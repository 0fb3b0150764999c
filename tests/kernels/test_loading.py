"""Directories compiled for a GPU: what is in them, and what is done with them where it is."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import dslc
from backends.pytorch.inputs import InputError
from backends.triton import installed
from backends.triton import load as loading
from backends.triton.generate import binaries
from compiler.errors import UserError
from dslc.program import Program, compile_file

HERE = Path(__file__).parent
SMALL = {"layers": 1, "dense": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A small model, with the binaries of its norms: those of all kernels take a minute."""
    folder = tmp_path_factory.mktemp("compiled") / "small"
    program = compile_file("dsv3", dims="small", set=SMALL, target="sm_90")
    assert program.generated is not None
    norms = [o for o in program.generated.operators if o.name.startswith("rms_norm")]
    some = binaries(replace(program.generated, operators=tuple(norms)), lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "binaries", lambda self, progress: some)
        program.save(folder)
    return folder


def test_the_directory_holds_text_and_binaries(directory: Path) -> None:
    index = json.loads((directory / "kernels/index.json").read_text())
    assert (index["target"], index["dtype"]) == ("sm_90", "bfloat16")
    assert index["kernels"]
    for row in index["kernels"]:
        assert (directory / row["file"]).read_bytes()[:4] == b"\x7fELF"
        assert row["spills"] == 0
        assert f"def {row['kernel']}(" in (directory / "kernels.py").read_text()
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["target"] == "sm_90"
    assert {row["file"] for row in index["kernels"]} <= set(manifest["files"])


def test_binaries_are_launched_and_nothing_is_compiled(directory: Path) -> None:
    """With a stand-in for Triton's driver: there is no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE / "loading.py"), str(directory), "rms_norm_256"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    index = json.loads((directory / "kernels/index.json").read_text())
    (row,) = [r for r in index["kernels"] if r["kernel"] == "rms_norm_256_kernel"]
    image = (directory / row["file"]).read_bytes()
    assert found["loaded"] == [["rms_norm_256_kernel", len(image), row["shared"]]]
    ((_, function, arguments),) = found["launched"]
    assert function == "function rms_norm_256_kernel"
    assert arguments[:3] == [[3, 256], [256], [3, 256]]
    assert found["compiled"] == 0
    # Another dtype, and a tensor that starts between two multiples of 16 bytes: Triton's own.
    assert found["own"] == ["torch.float32", "torch.bfloat16"]
    assert found["compiled_then"] == 2


def test_it_does_not_run_where_there_is_no_gpu(directory: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError) as wrong:
        dslc.load(directory, note=print)
    assert str(wrong.value) == (
        f"{directory} was compiled for sm_90, and does not run on cpu: load it on a GPU (device "
        "cuda), or compile it with --target cpu"
    )


def test_another_dtype_is_refused(directory: Path) -> None:
    with pytest.raises(InputError) as wrong:
        dslc.load(directory, dtype="float32", note=print)
    assert str(wrong.value) == (
        f"{directory} was compiled for activations in bfloat16, not float32: dslc compile --dtype "
        "says another"
    )


@pytest.mark.parametrize(
    ("gpu", "triton", "says"),
    [
        ("sm_90", None, None),
        ("sm_100", None, "compiled for sm_90, and this GPU is sm_100"),
        ("sm_90", "3.6.0", "and this is Triton 3.6.0"),
    ],
)
def test_another_gpu_or_triton_compiles_on_the_spot(
    gpu: str, triton: str | None, says: str | None, directory: Path, monkeypatch
) -> None:
    index = json.loads((directory / "kernels/index.json").read_text())
    monkeypatch.setattr(loading, "name_of", lambda device: gpu)
    reason = loading._other(index, torch.device("cuda"), triton or index["triton"])
    assert reason is None if says is None else says in str(reason)


@pytest.mark.parametrize(
    ("gpu", "has"), [("sm_80", False), ("sm_86", False), ("sm_89", True), ("sm_120", True)]
)
def test_8_bit_floats_are_refused_where_a_gpu_has_none(gpu: str, has: bool) -> None:
    """Not one of the GPUs that kernels are compiled for, perhaps: it would compile the text."""
    codes = {"target": "sm_90", "kernels": [{"arguments": [["w", "*fp8e4nv", True]]}]}
    loading._refuse_codes(Path("DIR"), {**codes, "kernels": []}, gpu)
    if has:
        loading._refuse_codes(Path("DIR"), codes, gpu)
        return
    with pytest.raises(InputError) as wrong:
        loading._refuse_codes(Path("DIR"), codes, gpu)
    assert str(wrong.value) == (
        f"DIR was compiled for sm_90 with weights in 8-bit floats, which this GPU, {gpu}, has not: "
        "compile without --deploy, or with one that keeps none so"
    )


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "which is not installed: pip install 'dslc[triton]'"),
        ("3.5.1", "3.6 or newer, and this is 3.5.1"),
    ],
)
def test_a_triton_that_cannot_be_used(found: str | None, message: str, monkeypatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(installed, "version", version)
    with pytest.raises(UserError) as wrong:
        installed.triton_version.__wrapped__()
    assert str(wrong.value) == f"kernels for a GPU take Triton{',' if not found else ''} {message}"


def test_what_was_changed_is_refused(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "changed")
    code = tmp_path / "changed" / "kernels.py"
    code.write_text(code.read_text() + "# mine\n")
    with pytest.raises(UserError, match=r"kernels\.py"):
        dslc.load(tmp_path / "changed", note=print)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"target": "h100"},
            "there is no target 'h100'; there is cpu, cuda (the GPU of this machine), "
            "sm_80 (A100), sm_89 (L40, RTX 4090), sm_90 (H100, H200), sm_100 (B200), "
            "gfx942 (MI300)",
        ),
        (
            {"target": "gfx942", "deploy": "fp8"},
            "gfx942 does not multiply e4m3 1 x 128 of d, which models/dsv3.arch:144 asks for; "
            "leave out --deploy, or compile for sm_89, sm_90, sm_100",
        ),
    ],
)
def test_targets_that_cannot_be(choices: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as wrong:
        compile_file("dsv3", dims="small", **choices).code()
    assert str(wrong.value) == message
