"""A checkpoint's weights are laid out once, in a file that later runs map; what is wrong with such
a file, or with the place it should lie in, is seen."""

import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from backends.mlir.archive import is_whole
from backends.mlir.model import Model, load
from backends.pytorch import memory
from dslc.cli import run
from mlir.compiled import ODD, compiled

pytest.importorskip("iree.runtime")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("archive") / "checkpoint"
    sets = [f"--set={key}={value}" for key, value in ODD["dsv3"].items()]
    assert run(["init", str(where), "dsv3", "--dims", "small", "--dtype", "float32", *sets]) == 0
    return where


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled("dsv3"), tmp_path / "model"))


def opened(directory: Path, checkpoint: Path) -> tuple[Model, list[str]]:
    notes: list[str] = []
    return load(directory, checkpoint, note=notes.append), notes


def archive(directory: Path) -> Path:
    (found,) = Path(f"{directory}.weights").iterdir()
    return found


def logits(model: Model) -> np.ndarray:
    return model(np.array([[1, 2, 3, 4]]))


def test_the_second_run_maps_what_the_first_one_wrote(directory: Path, checkpoint: Path) -> None:
    first, notes = opened(directory, checkpoint)
    size = sum(p.stat().st_size for p in archive(directory).parent.iterdir())
    assert len(notes) == 1
    assert notes[0].startswith(
        f"the weights were laid out for the module in {archive(directory)} ("
    )
    assert notes[0].endswith("); later runs map that file")
    written = archive(directory).stat().st_mtime_ns
    second, notes = opened(directory, checkpoint)
    assert (notes, archive(directory).stat().st_mtime_ns) == ([], written)
    np.testing.assert_array_equal(logits(first), logits(second))
    assert second.session.mapped == archive(directory)
    assert size > 0


def test_the_archive_is_a_safetensors_file_of_aligned_tensors(
    directory: Path, checkpoint: Path
) -> None:
    model, _ = opened(directory, checkpoint)
    with safe_open(archive(directory), "np") as file:
        for key, row in model.layout.weights.items():
            assert file.get_tensor(key).shape == row.shape


def test_another_checkpoint_is_another_archive(directory: Path, checkpoint: Path) -> None:
    opened(directory, checkpoint)
    first = archive(directory)
    weights = checkpoint / "model.safetensors"
    os.utime(weights, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns + 10**9))
    _, notes = opened(directory, checkpoint)
    assert archive(directory) != first  # and the old one is gone
    assert len(notes) == 1


@pytest.mark.parametrize(
    "fault", ["cut off", "one bit", "another header", "another kind of file", "empty"]
)
def test_an_archive_that_is_not_whole_is_written_again(
    fault: str, directory: Path, checkpoint: Path
) -> None:
    model, _ = opened(directory, checkpoint)
    expected, path = logits(model), archive(directory)
    data = path.read_bytes()
    path.unlink()  # not in place: that file is mapped
    path.write_bytes(
        {
            "cut off": data[: len(data) // 2],
            "one bit": data[:-9] + bytes([data[-9] ^ 64]) + data[-8:],
            "another header": data.replace(b'"made_of": "', b'"made_of": "0', 1),
            "another kind of file": b"no archive at all",
            "empty": b"",
        }[fault]
    )
    model, notes = opened(directory, checkpoint)
    assert len(notes) == 1
    np.testing.assert_array_equal(logits(model), expected)
    assert untimed(path.read_bytes()) == untimed(data)


def untimed(data: bytes) -> bytes:
    return re.sub(rb'"written": "\d+"', b"", data)


@pytest.mark.parametrize(
    "number", [errno.EEXIST, errno.ENOSPC, errno.EROFS, errno.EACCES], ids=os.strerror
)
def test_where_nothing_can_be_written_weights_are_held(
    number: int, directory: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if number == errno.EEXIST:
        Path(f"{directory}.weights").write_text("in the way")

    def full(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    model, notes = opened(directory, checkpoint)
    assert notes == [
        f"the weights are read into memory: {directory}.weights cannot be written "
        f"({os.strerror(number)})"
    ]
    assert np.isfinite(logits(model)).all() and model.session.mapped is None
    left = Path(f"{directory}.weights")
    assert not left.is_dir() or not list(left.iterdir())


def test_a_writer_that_was_killed_leaves_nothing(directory: Path, checkpoint: Path) -> None:
    folder = Path(f"{directory}.weights")
    folder.mkdir()
    (folder / ".x.safetensors.0.writing").write_bytes(b"half of it")
    opened(directory, checkpoint)
    assert archive(directory).suffix == ".safetensors"


def test_weights_that_do_not_fit_are_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(memory.MemoryNeeded) as caught:
        load(directory)
    assert str(caught.value).startswith("loading the weights needs ")
    assert str(caught.value).endswith("; cpu has 1,000 B available")


def test_a_cache_that_does_not_fit_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(directory)
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(memory.MemoryNeeded) as caught:
        model.generate([[1, 2, 3]], max_new_tokens=400)
    assert str(caught.value) == (
        "a cache of 1 x 406 positions needs 103.9 KB; cpu has 1,000 B available"
    )


def test_an_archive_without_a_tensor_is_not_whole(directory: Path, checkpoint: Path) -> None:
    model, _ = opened(directory, checkpoint)
    layout, path = model.layout, archive(directory)
    more = {**layout.weights, "more": next(iter(layout.weights.values()))}
    changed = layout.model_copy(update={"weights": more})
    assert is_whole(path, _made_of(path), layout)
    assert not is_whole(path, _made_of(path), changed)


def _made_of(path: Path) -> str:
    with safe_open(path, "np") as file:
        return str(file.metadata()["made_of"])
