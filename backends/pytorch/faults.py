"""How a job of several processes ends when one of them fails: at once, and with one message.

- A rank that *raises* says so, and ends; whoever launched it ends the others.
- A rank that *dies* is seen by whoever launched it (``dslc run --nproc``, torchrun).
- A rank that is *stopped* (SIGSTOP) is ended by a small process beside it, forked before anything
  else begins, which says so. It ends a rank whose *launcher is gone* too.
- A rank that *cannot be reached* does not renew its sign of life in the job's store: each rank
  looks after the next one. It needs no answer from the rank that it waits for.

Whoever has something to say claims the right to: on this host through a file, and among all hosts
through the store, so that one message is shown. A lost connection says nothing of why: who meets
one waits for the message of whoever knows.

This module imports torch only where it talks to the store.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

BEAT = 1.0  # seconds between two signs of life
SILENCE = 10.0  # without one for so long, a rank is lost
STOPPED = 4.0  # a process that is stopped for so long is ended
PATIENCE = 15.0  # how long a rank that lost a connection waits for whoever knows why
TOLD = "DSLC_TOLD"  # the file that is there when a message has been shown on this host


def me() -> str:
    """This rank, as messages name it."""
    return f"rank {os.environ.get('RANK', 0)} ({socket.gethostname()}, process {os.getpid()})"


# -- one message -----------------------------------------------------------------------------------

_store: Any = None  # the job's, when it is there


def _told_file() -> Path:
    given = os.environ.get(TOLD)
    if given:
        return Path(given)
    job = f"{os.getuid()}-{os.getppid()}-{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
    return Path(tempfile.gettempdir()) / f"dslc-told-{job}"


def was_told() -> bool:
    return _told_file().exists()


def claim(message: str) -> bool:
    """Whether this process is the one to show a message of the job's end."""
    try:
        os.close(os.open(_told_file(), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:
        pass  # better twice than not at all
    if _store is None:
        return True
    try:
        mine = f"{time.time()} {os.environ.get('RANK')}"
        return bool(_store.compare_set("dslc/told", "", mine).decode() == mine)
    except Exception:
        return True  # the store cannot be reached: the others cannot either, or are told apart


def tell(message: str) -> None:
    """Show a message of the job's end, unless another was shown."""
    if claim(message):
        print(f"error: {message}", file=sys.stderr, flush=True)


def failed(error: BaseException, text: str) -> None:
    """A rank's work has failed. Says so; of a lost connection only if no one else does."""
    if type(error).__name__ == "ConnectionLost":  # by name: its module imports torch
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not was_told():
            time.sleep(0.2)
    tell(f"{me()}: {text}")


# -- a process that is stopped ---------------------------------------------------------------------


def watch_over() -> None:
    """Fork a process that ends this one if it is stopped, or whoever launched it is gone. To be
    called before threads begin, and before torch is imported: its own words about what fails are
    left to us."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if not Path("/proc/self/stat").exists():
        return
    parent, launcher = os.getpid(), os.getppid()
    sys.stderr.flush()
    sys.stdout.flush()
    if os.fork():
        return
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _watch(parent, launcher)
    finally:
        os._exit(0)


def _watch(parent: int, launcher: int) -> None:
    since: float | None = None
    last = time.monotonic()
    while os.getppid() == parent:
        time.sleep(0.5)
        now = time.monotonic()
        if now - last > 2 * BEAT:  # this process was stopped too: all is well with the other
            since = None
        last = now
        state, above = _about(parent)
        if above not in (launcher, 0):
            name = f"rank {os.environ['RANK']} ({socket.gethostname()}, process {parent})"
            tell(f"{name} is ended, as the process that launched it is gone")
            os.kill(parent, signal.SIGKILL)
            return
        if state not in ("T", "t"):
            since = None
            continue
        since = now if since is None else since
        if now - since > STOPPED:
            name = f"rank {os.environ['RANK']} ({socket.gethostname()}, process {parent})"
            tell(f"{name} was stopped, and is ended")
            os.kill(parent, signal.SIGKILL)
            return


def _about(process: int) -> tuple[str, int]:
    """A process' state (T is stopped) and its parent; 0 if there is none any more."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return "", 0
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def _machine() -> str:
    """What tells the machines apart on which a process' number means something: several may have
    one name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"unknown:{os.getpid()}"  # no other process is on it


# -- a rank that cannot be reached -----------------------------------------------------------------


class Pulse:
    """Renews this rank's sign of life, and looks for that of the next rank.

    Args:
        connect: makes a connection to the job's store that nothing else uses.
    """

    def __init__(self, connect: Callable[[], Any], rank: int, world: int):
        global _store
        self._store = connect()
        _store = connect()
        _store.set("dslc/told", "")
        self._rank, self._next = rank, (rank + 1) % world
        self._alive = self._reached = time.monotonic()
        self._seen: bytes = b""
        self._who = f"rank {self._next}"
        self._done = threading.Event()
        self._store.set(f"dslc/who/{rank}", f"{socket.gethostname()} {os.getpid()} {_machine()}")
        for work in (self._beat, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def end(self) -> None:
        """This rank is done: no one need look for it any more."""
        self._done.set()
        with suppress(Exception):
            self._store.set(f"dslc/beat/{self._rank}", "done")

    def _beat(self) -> None:
        count = 0
        while not self._done.wait(BEAT):
            try:
                count += 1
                self._store.set(f"dslc/beat/{self._rank}", str(count))
                if self._store.check([f"dslc/beat/{self._next}"]):
                    seen = self._store.get(f"dslc/beat/{self._next}")
                    if seen != self._seen or seen == b"done":
                        self._seen, self._alive = seen, time.monotonic()
                self._reached = time.monotonic()
            except Exception:
                pass  # ``_judge`` sees how long that has been so

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._done.wait(BEAT):
            now = time.monotonic()
            if now - last > 3 * BEAT:  # this process was stopped itself: the others had no chance
                self._alive = self._reached = now
            last = now
            if now - self._reached > SILENCE:
                tell(
                    f"{me()} cannot reach the job's store at {os.environ.get('MASTER_ADDR')}: "
                    f"no answer for {SILENCE:.0f} s"
                )
                os._exit(1)
            if now - self._alive > SILENCE:
                self._lost()

    def _lost(self) -> None:
        host, process, machine = "", "", ""
        with suppress(Exception):
            host, process, machine = self._store.get(f"dslc/who/{self._next}").decode().split()
        where = f" ({host}, process {process})" if host else ""
        tell(f"rank {self._next}{where} has given no sign of life for {SILENCE:.0f} s")
        if machine == _machine() and process:
            with suppress(OSError):
                os.kill(int(process), signal.SIGKILL)  # a stopped process does not end otherwise
        os._exit(1)
