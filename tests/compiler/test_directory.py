"""Compiled directories are written whole or not at all."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compiler import directory, manifest
from compiler.directory import DirectoryError, write
from compiler.manifest import Manifest, digest


def made(text: str) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest and two files, one in a folder, with this text."""
    files = {"model.py": text.encode(), "kernels/a.cubin": text.encode() * 1000}
    about = Manifest(
        dslc="0",
        model="toy",
        sources=(),
        constants={},
        entries={},
        parameters=(),
        caches=(),
        files={name: digest(data) for name, data in files.items()},
    )
    return about, files


def held(path: Path) -> str:
    """The text that a whole directory was written with."""
    found = manifest.verified_files(path, manifest.read(path))
    assert {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} == {
        *found,
        "manifest.json",
    }
    return found["model.py"].decode()


def beside(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p != path)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "build" / "toy"


def test_folders_are_made_and_what_was_compiled_before_is_replaced(out):
    for text in ("first", "second", "second"):
        write(out, *made(text))
        assert held(out) == text
        assert beside(out) == []
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_empty_directory_is_taken(out):
    out.mkdir(parents=True)
    write(out, *made("new"))
    assert held(out) == "new"


def test_a_link_stays_one(out, tmp_path):
    out.parent.mkdir()
    out.symlink_to(tmp_path / "elsewhere")
    for text in ("first", "second"):
        write(out, *made(text))
        assert out.is_symlink() and held(tmp_path / "elsewhere") == text


def stopped_at(event: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in a process that is killed before its n-th system event; was it?"""
    child = os.fork()
    if child == 0:
        left = event

        def hook(name: str, _: object) -> None:
            nonlocal left
            if name.startswith(("os.", "open", "shutil.", "ctypes.", "fcntl.")):
                left -= 1
                if left < 0:
                    os._exit(77)

        try:
            sys.addaudithook(hook)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 77)
    return status == 77


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_crash_at_any_moment_leaves_the_old_or_the_new(out, exchanges, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(directory, "_exchange", refuse)
    write(out, *made("old"))
    event, seen = 0, []
    while stopped_at(event, lambda: write(out, *made("new"))):
        seen.append(held(out) if out.exists() else "none")
        if seen[-1] != "old":
            write(out, *made("old"))
        event += 1
    moments = ["old", "new"] if exchanges else ["old", "none", "new"]
    assert list(dict.fromkeys(seen)) == moments and event > 10
    write(out, *made("last"))
    assert held(out) == "last" and beside(out) == []  # what crashes left is gone


def refuse(a: Path, b: Path) -> None:
    raise OSError(errno.EINVAL, "not on this file system")


def test_a_crash_while_nothing_is_there_leaves_nothing_or_all(out):
    event = 0
    while stopped_at(event, lambda: write(out, *made("new"))):
        if out.exists():
            assert held(out) == "new"
            for file in sorted(out.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            out.rmdir()
        event += 1
    assert held(out) == "new"


def test_writers_at_the_same_time_do_not_mix(out):
    children = []
    for number in range(6):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(10):
                    write(out, *made(f"{number}"))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert {os.waitpid(child, 0)[1] for child in children} == {0}
    assert held(out) in "012345"
    assert beside(out) == []


@pytest.mark.parametrize("readable", [True, False])
def test_files_of_others_are_not_removed(out, readable):
    if readable:
        write(out, *made("mine"))
    (out / "notes").mkdir(parents=True)
    (out / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(DirectoryError) as caught:
        write(out, *made("new"))
    assert "it holds files that dslc did not write (notes/thesis.txt)" in str(caught.value)
    assert (out / "notes" / "thesis.txt").read_text() == "years of work"
    assert beside(out) == []


def test_a_directory_of_another_version_is_replaced(out):
    write(out, *made("old"))
    file = out / "manifest.json"
    file.write_text(file.read_text().replace('"abi": 1', '"abi": 9, "later": true'))
    write(out, *made("new"))
    assert held(out) == "new"


def test_bytecode_of_what_was_compiled_is_not_of_others(out):
    write(out, *made("old"))
    (out / "__pycache__").mkdir()
    (out / "__pycache__" / "model.pyc").write_text("")
    write(out, *made("new"))
    assert held(out) == "new"


def test_a_file_in_the_way_is_told(out):
    out.parent.mkdir()
    out.write_text("")
    with pytest.raises(DirectoryError, match="it is a file, not a directory"):
        write(out, *made("new"))
    with pytest.raises(DirectoryError, match=r"cannot write .*toy"):
        write(out / "below", *made("new"))


def test_a_full_disk_leaves_what_was_there(out, monkeypatch):
    write(out, *made("old"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DirectoryError, match="No space left on device"):
        write(out, *made("new"))
    assert held(out) == "old" and beside(out) == []
