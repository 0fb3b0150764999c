"""``dslc compile --backend mlir`` and ``dslc run``: without torch, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlir.compiled import compiled, reference

pytest.importorskip("iree.compiler")
pytest.importorskip("iree.runtime")

# A fresh process in which importing torch fails as where it is not installed.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({names}))\nfrom dslc.cli import main\n"
MAIN = "sys.exit(main(sys.argv[1:]))"


def dslc(*arguments: object, without: tuple[str, ...] = ("torch",)) -> subprocess.CompletedProcess:
    code = WITHOUT.format(names=without) + MAIN
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled("dsv3"), tmp_path / "copy", symlinks=False))


def test_run_needs_no_torch_and_no_compiler() -> None:
    import torch

    done = dslc(
        "run", compiled("dsv3"), "--tokens", "1,2,3,4", "--tokens", "5,6", "--max-new-tokens", "5",
        "--json", without=("torch", "iree.compiler", "torch_mlir"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = reference("dsv3").generate(
        torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2]), max_new_tokens=5
    )
    found = json.loads(done.stdout)
    assert found["tokens"] == [row.tolist() for row in expected]
    assert found["timing"]["decode_tokens_per_second"] > 0


def test_without_the_runtime(tmp_path: Path) -> None:
    done = dslc("run", compiled("dsv3"), "--tokens", "1", without=("iree", "iree.runtime"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {compiled('dsv3')} needs IREE's runtime: pip install 'dslc[mlir]'\n"
    )


def test_without_the_compiler(tmp_path: Path) -> None:
    done = dslc(
        "compile", "dsv3", "--dims", "small", "--backend", "mlir", "-o", tmp_path / "x",
        without=("iree", "iree.compiler"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "--backend mlir needs IREE's compiler: pip install 'dslc[mlir]'\n" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_changed_module_is_refused(tmp_path: Path) -> None:
    where = copy(tmp_path)
    module = where / "module.vmfb"
    data = bytearray(module.read_bytes())
    data[len(data) // 2] ^= 1
    module.write_bytes(data)
    done = dslc("run", where, "--tokens", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {module} is not the file that was compiled (SHA-256 ")
    assert done.stderr.endswith(": compile it again\n")


def rewritten(where: Path, **changes: object) -> None:
    """Change module.json, and the manifest so that its hash is right."""
    layout = json.loads((where / "module.json").read_text()) | changes
    replaced(where, "module.json", json.dumps(layout).encode())


def replaced(where: Path, name: str, data: bytes) -> None:
    from compiler.manifest import digest

    (where / name).write_bytes(data)
    manifest = json.loads((where / "manifest.json").read_text())
    manifest["files"][name] = digest(data)
    (where / "manifest.json").write_text(json.dumps(manifest))


def test_another_processors_module_is_refused(tmp_path: Path) -> None:
    where = copy(tmp_path)
    layout = json.loads((where / "module.json").read_text())
    rewritten(where, processor=[*layout["processor"], "avx4096"])
    done = dslc("run", where, "--tokens", "1")
    assert (done.returncode, done.stderr) == (
        1,
        "error: the module was compiled for a processor with instructions that this one lacks "
        "(avx4096): compile it here\n",
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"caches": []}, "module.json has other caches than the manifest: compile it again"),
        (
            {"name": "Other"},
            "{where}/module.vmfb cannot be run (compiled by IREE {version}, this is {version}): it "
            "holds no module 'Other'",
        ),
        ({"dtype": "f4"}, "module.json: dtype: Input should be 'float32' or 'bfloat16'"),
        (
            {"dtype": "bfloat16"},
            "the module reads 'embed' as f32 [97, 36], the manifest has bf16 [97, 36]",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    from iree.runtime.version import VERSION

    where = copy(tmp_path)
    layout = json.loads((where / "module.json").read_text())
    caches = [row | {"element": "bf16"} for row in layout["caches"]]
    rewritten(where, **({"caches": caches} if changes.get("dtype") == "bfloat16" else {}) | changes)
    done = dslc("run", where, "--tokens", "1")
    said = message.format(where=where, version=VERSION)
    assert (done.returncode, done.stderr) == (1, f"error: {said}\n")


def test_a_module_that_iree_cannot_read_is_refused(tmp_path: Path) -> None:
    """As one of another version of IREE would be."""
    where = copy(tmp_path)
    rewritten(where, compiler="2.0")
    replaced(where, "module.vmfb", (where / "module.vmfb").read_bytes()[:5000])
    done = dslc("run", where, "--tokens", "1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        f"error: {where}/module.vmfb cannot be run (compiled by IREE 2.0, this is "
    )


@pytest.mark.parametrize("name", ["module.vmfb", "module.json"])
def test_a_file_that_is_missing(name: str, tmp_path: Path) -> None:
    where = copy(tmp_path)
    (where / name).unlink()
    done = dslc("run", where, "--tokens", "1")
    assert done.stderr == f"error: {where / name} cannot be read: No such file or directory\n"
    manifest = json.loads((where / "manifest.json").read_text())
    del manifest["files"][name]
    (where / "manifest.json").write_text(json.dumps(manifest))
    done = dslc("run", where, "--tokens", "1")
    assert done.stderr == f"error: the compiled model holds no {name}: compile it again\n"


def test_a_module_that_reads_other_weights_is_refused(tmp_path: Path) -> None:
    where = copy(tmp_path)
    rewritten(where, weights={"layers[0:9].W": {"tensor": "x", "shape": [9], "element": "f32"}})
    done = dslc("run", where, "--tokens", "1")
    assert (done.returncode, done.stderr) == (
        1,
        "error: the module reads 'layers[0:9].W', which the manifest does not list\n",
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (("--dtype", "bfloat16"), "{where} was compiled for float32, not for bfloat16"),
        (("--device", "cuda"), "{where} runs on the CPU, not on 'cuda'"),
        (("--tokens", "97"), "'token' 97 is not one of 0 .. 96"),
    ],
)
def test_what_a_module_cannot_do(options: tuple[str, ...], message: str) -> None:
    where = compiled("dsv3")
    done = dslc("run", where, "--tokens", "1", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {message.format(where=where)}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("dsv3", "--dims", "small", "--deploy", "ep2", "--backend", "mlir"),
            "the MLIR backend compiles for one process, not for the mesh of deployment 'ep2'",
        ),
        (
            ("dsv3", "--dims", "small", "--backend", "mlir", "--optimize"),
            "--optimize compiles the PyTorch backend's decoding, not --backend mlir's",
        ),
        (("dsv3", "--dialect", "tosa"), "--dialect says what --emit mlir prints"),
    ],
)
def test_what_cannot_be_compiled(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = dslc("compile", *arguments, "-o", tmp_path / "x")
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")
    assert not (tmp_path / "x").exists()
