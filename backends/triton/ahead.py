"""Compiling kernels ahead of time, on a machine without a GPU; what was compiled once is kept."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.triton.installed import triton_version
from backends.triton.kernel import Config, Kernel
from backends.triton.targets import Target
from compiler.errors import UserError

CACHE = "DSLC_KERNEL_CACHE"
RECORD = 1  # of what the cache holds; another number, another key
WORKER = Path(__file__).with_name("worker.py")
IMPORTS = "import triton\nimport triton.language as tl\n\n"


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        image: the file with the machine code; metadata: the file with what Triton says about it.
        registers: of a thread; stack: bytes of local memory of a thread.
        spills: instructions that write registers to local memory or read them back.
        shared: bytes of shared memory of a program.
        products: how often each instruction that multiplies matrices occurs: HGMMA, QGMMA, ...
        seconds: of a core, to compile it.
        cached: it was found, not compiled.
        replaces: the configuration that was wanted, where it did not fit the GPU; because: why.
    """

    kernel: Kernel
    config: Config
    target: Target
    image: Path
    metadata: Path
    registers: int
    stack: int
    spills: int
    shared: int
    products: Mapping[str, int]
    seconds: float
    cached: bool
    replaces: Config | None = None
    because: str = ""

    @property
    def warpgroup(self) -> bool:
        """It multiplies with Hopper's warpgroup instructions (``wgmma``)."""
        return any(name.endswith("GMMA") for name in self.products)


def compile_ahead(
    wanted: Iterable[tuple[Kernel, Config]],
    target: Target,
    progress: Callable[[str], None] = lambda _: None,
    processes: int | None = None,
) -> list[Binary]:
    """Compile each kernel in each of its configurations, in as many processes as there are cores.

    What an earlier call compiled with the same text, tiles and Triton is taken from
    ``$DSLC_KERNEL_CACHE``, or ``~/.cache/dslc/kernels``.

    Args:
        progress: told how far it is.

    Raises:
        UserError: Triton is not installed, or too old, or cannot compile one of them, which the
            message names.
    """
    found = []
    for one in try_ahead(wanted, target, progress, processes, patient=False):
        if isinstance(one, UserError):
            raise one
        found.append(one)
    return found


def try_ahead(
    wanted: Iterable[tuple[Kernel, Config]],
    target: Target,
    progress: Callable[[str], None] = lambda _: None,
    processes: int | None = None,
    patient: bool = True,
) -> list[Binary | UserError]:
    """The same, with what cannot be compiled as the message in its place.

    Args:
        patient: go on after the first of these; without, what was not tried has its message too.

    Raises:
        UserError: Triton is not installed, or too old.
    """
    triton = triton_version()
    jobs = list(wanted)
    keys = [_key(kernel, config, target, triton) for kernel, config in jobs]
    folder = cache_folder()
    found = {key: kept for key in keys if (kept := _kept(folder / key)) is not None}
    before = set(found)
    missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in found}
    problems: dict[str, UserError] = {}
    if missing:
        compiling = _Compiling(missing, target, folder, progress, patient)
        compiling.run(processes or _cores())
        found |= compiling.done
        problems = compiling.problems
    first = next(iter(problems.values()), None)
    return [
        Binary(
            kernel=kernel,
            config=config,
            target=target,
            image=folder / key / f"kernel.{target.binary}",
            metadata=folder / key / "kernel.json",
            cached=key in before,
            **found[key],
        )
        if key in found
        else problems.get(key) or _present(first)
        for key, (kernel, config) in zip(keys, jobs, strict=True)
    ]


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if own := os.environ.get(CACHE):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dslc" / "kernels"


def request(kernel: Kernel, config: Config, target: Target) -> dict[str, Any]:
    """What the worker is asked."""
    signature = {argument.name: argument.type for argument in kernel.arguments}
    signature |= dict.fromkeys(config.constants, "constexpr")
    helpers = "\n\n".join(text.strip() for _, text in kernel.helpers)
    return {
        "name": kernel.name,
        "text": f"{IMPORTS}{helpers}\n\n{kernel.source.strip()}\n",
        "signature": signature,
        "constants": dict(config.constants),
        "aligned": [i for i, argument in enumerate(kernel.arguments) if argument.aligned],
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "target": [target.backend, target.arch, target.warp],
    }


def _key(kernel: Kernel, config: Config, target: Target, triton: str) -> str:
    asked = json.dumps([RECORD, triton, request(kernel, config, target)], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:40]


def _kept(folder: Path) -> dict[str, Any] | None:
    try:
        about = json.loads((folder / "about.json").read_bytes())
        return dict(about) if (folder / "kernel.json").is_file() else None
    except (OSError, ValueError):
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _present(problem: UserError | None) -> UserError:
    assert problem is not None, "what is missing was compiled, or was not for a reason"
    return problem


@dataclass
class _Compiling:
    """Compiles what is missing, and keeps it.

    Attributes:
        done: what each was found to take; problems: why others cannot be compiled.
    """

    missing: Mapping[str, tuple[Kernel, Config]]
    target: Target
    folder: Path
    progress: Callable[[str], None]
    patient: bool
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, UserError] = field(default_factory=dict)

    def run(self, processes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        for key in self.missing:
            todo.put(key)
        lock = threading.Lock()
        threads = [
            threading.Thread(target=self._serve, args=(todo, lock))
            for _ in range(min(processes, len(self.missing)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _serve(self, todo: queue.SimpleQueue[str], lock: threading.Lock) -> None:
        with _Worker() as worker:
            while self.patient or not self.problems:
                try:
                    key = todo.get_nowait()
                except queue.Empty:
                    return
                kernel, config = self.missing[key]
                try:
                    about = _compile_one(worker, kernel, config, self.target, self.folder, key)
                except UserError as problem:
                    self.problems[key] = problem
                    if worker.dead:
                        worker.start()
                    continue
                with lock:
                    self.done[key] = about
                    of = f"{len(self.done)} of {len(self.missing)}"
                    self.progress(f"{self.target.name} kernels, {of}: {kernel.name}")


def _compile_one(
    worker: _Worker, kernel: Kernel, config: Config, target: Target, folder: Path, key: str
) -> dict[str, Any]:
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix="new-"))
    try:
        answer = worker.ask({**request(kernel, config, target), "folder": str(temporary)})
        if "error" in answer:
            raise UserError(
                f"Triton {triton_version()} cannot compile kernel {kernel.name} for "
                f"{target.name} with {config.text()}: {answer['error']}"
            )
        (temporary / "about.json").write_text(json.dumps(answer))
        if not (folder / key).exists():
            temporary.rename(folder / key)
        return answer
    except OSError as error:
        if _kept(folder / key) is not None:  # another process was faster
            return dict(_kept(folder / key) or {})
        raise UserError(f"compiled kernels cannot be kept in {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Worker:
    """A process that compiles one kernel after another."""

    def __enter__(self) -> _Worker:
        self.start()
        return self

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None

    def start(self) -> None:
        # -P: the worker's folder is not searched for modules.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            self.listener.join(1)
            last = "".join(self.said[-3:]).strip() or f"status {self.process.returncode}"
            return {"error": f"its compiler died: {last}"}
        return dict(json.loads(answer))

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
