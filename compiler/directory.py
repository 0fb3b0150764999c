"""Compiled directories are written whole or not at all, whenever the process or machine stops.

Everything is written into a sibling directory and synced to disk; then the two *exchange names* in
one step of the kernel (``renameat2`` with RENAME_EXCHANGE on Linux, ``renamex_np`` with RENAME_SWAP
on macOS), and what is then the old directory is removed. A reader sees the old directory or the
new one, never a mixture or a gap. The alternative, a versioned directory behind a symbolic link,
cannot take the place of a directory that is there already, and leaves versions that ``rm -r``
misses.

Where the file system cannot exchange names (NFS, some overlays), the old directory is moved aside
first: for a moment there is none, but what is there is still whole.

A process that was killed leaves its sibling directory (``.name.*.writing``); the next write removes
it. Live writers hold a lock on theirs, so nobody removes a directory that is being written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from compiler.errors import UserError
from compiler.manifest import FILE_NAME, Manifest

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fs.h; RENAME_SWAP of macOS has the same value
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV, errno.EOPNOTSUPP}
SUFFIX = ".writing"


class DirectoryError(UserError):
    """An output directory that dslc will not, or cannot, write; in one sentence."""


def write(directory: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """Make ``directory`` hold the manifest and the files, and nothing else.

    What was compiled there before is replaced; any other content is not touched.

    Raises:
        DirectoryError: the directory holds files that dslc did not write, or the system refuses.
    """
    target = Path(os.path.realpath(directory))  # through a link, so that the link stays one
    _refuse_strangers(directory, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        written = _write_beside(target, {**files, FILE_NAME: manifest.text().encode()})
        try:
            _take_place_of(written.path, target)
        finally:
            shutil.rmtree(written.path, ignore_errors=True)
            os.close(written.lock)
        _remove_leftovers(target)  # not before: one of them may be the last whole directory
    except OSError as error:
        reason = error.strerror or str(error)
        raise DirectoryError(f"cannot write {error.filename or directory}: {reason}") from error


@contextlib.contextmanager
def fresh(directory: Path) -> Iterator[Path]:
    """A folder to write files into, which becomes ``directory`` at the end, or leaves nothing.

    Raises:
        DirectoryError: there is something already, or the system refuses.
    """
    target = Path(os.path.realpath(directory))
    if os.path.lexists(target) and not target.is_dir():
        raise DirectoryError(f"cannot write {directory}: it is a file, not a directory")
    try:
        if target.is_dir() and any(target.iterdir()):
            raise DirectoryError(
                f"will not write {directory}: it is not empty; choose another directory"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target, unfinished=True)  # first, as they may fill the disk
        written = _Written(target)
        try:
            yield written.path
            for path in written.path.rglob("*"):
                _sync(path)
            _sync(written.path)
            os.rename(written.path, target)  # refused if somebody has written there meanwhile
            _sync(target.parent)
        finally:
            shutil.rmtree(written.path, ignore_errors=True)
            os.close(written.lock)
        _remove_leftovers(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DirectoryError(f"cannot write {directory}: {reason}") from error


def strangers(directory: Path) -> list[str]:
    """The files in a directory that dslc did not put there; all of them if it is none of ours."""
    ours: set[str] = set()
    with contextlib.suppress(OSError, ValueError, RecursionError):
        fields = json.loads((directory / FILE_NAME).read_bytes())  # of any version: no validation
        if isinstance(fields, dict) and "abi" in fields and isinstance(fields.get("files"), dict):
            ours = {FILE_NAME, *fields["files"]}
    return sorted(
        name
        for folder, _, names in os.walk(directory)
        for name in (os.path.relpath(os.path.join(folder, n), directory) for n in names)
        if name.replace(os.sep, "/") not in ours and "__pycache__" not in name
    )


def _refuse_strangers(shown: Path, target: Path) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise DirectoryError(f"cannot write {shown}: it is a file, not a directory")
    others = strangers(target)
    if others:
        named = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise DirectoryError(
            f"will not replace {shown}: it holds files that dslc did not write ({named}); "
            "choose another directory or move them"
        )


class _Written:
    """A directory that is whole on disk, and the lock that says that its writer lives."""

    def __init__(self, target: Path):
        while True:
            self.path = _beside(target)
            self.path.mkdir()  # with the user's umask, unlike tempfile's
            # Before it is locked, another writer may take it for a dead one's and remove it.
            with contextlib.suppress(FileNotFoundError):
                self.lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(self.lock, fcntl.LOCK_EX)
                if self.path.exists():
                    return
                os.close(self.lock)


def _write_beside(target: Path, files: Mapping[str, bytes]) -> _Written:
    written = _Written(target)
    try:
        for name, data in files.items():
            path = written.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for folder in {(written.path / name).parent for name in files}:
            _sync(folder)
    except BaseException:
        shutil.rmtree(written.path, ignore_errors=True)
        os.close(written.lock)
        raise
    return written


def _take_place_of(new: Path, target: Path) -> None:
    """``target`` is what ``new`` was; what ``target`` was, if anything, is ``new`` or gone."""
    try:
        os.rename(new, target)  # enough where there is nothing, or an empty directory
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        try:
            _exchange(new, target)
        except OSError as refused:
            if refused.errno not in NOT_SUPPORTED:
                raise
            aside = _beside(target)
            os.rename(target, aside)
            os.rename(new, target)
            shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}{SUFFIX}"


def _exchange(a: Path, b: Path) -> None:
    """Swap two names in one step.

    Raises:
        OSError: with an errno of NOT_SUPPORTED if the system or file system cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(first, second, RENAME_EXCHANGE)
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE)
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(b))


def _remove_leftovers(target: Path, unfinished: bool = False) -> None:
    """Directories of writers that were killed: nobody holds their lock.

    Args:
        unfinished: not those that are whole, one of which may be the last that there is.
    """
    for left in target.parent.glob(f".{target.name}.*{SUFFIX}"):
        if unfinished and (left / FILE_NAME).exists():
            continue
        try:
            lock = os.open(left, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except OSError:
            pass  # its writer is alive
        finally:
            os.close(lock)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
