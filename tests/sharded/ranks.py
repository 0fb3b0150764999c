"""Runs functions in the ranks of meshes: many meshes cost little more than one.

One process imports torch and forks the ranks of one job after the other. They meet through a store
on a free port, as torchrun's workers do.

    python tests/sharded/ranks.py FOLDER MODULE.FUNCTION:NAME:RANKS...

calls ``function(folder, name, rank)`` in every rank of each job.
"""

import fcntl
import importlib
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).parent


def once(factory, name, prepare):
    """A folder that one of the workers of this test session fills, by ``prepare(folder)``."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / name
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir()  # not twice: a worker that failed has said why
            prepare(folder)
            (folder / "done").touch()
    return folder


def launch(folder, *jobs):
    """Run jobs, ``("module.function", name, ranks)`` each."""
    told = [":".join(map(str, job)) for job in jobs]
    path = f"{HERE}:{HERE.parent.parent}:{os.environ.get('PYTHONPATH', '')}"
    subprocess.run(
        [sys.executable, HERE / "ranks.py", folder, *told],
        check=True,
        env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"),
    )


def run(folder: Path, work, name: str, count: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number in range(count):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        status = 1
        try:
            os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "MASTER_PORT": str(port),
                           "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                           "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
            work(folder, name, number)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    failed = [n for n, p in enumerate(processes) if os.waitpid(p, 0)[1]]
    if failed:
        sys.exit(f"{name}: ranks {failed} failed")


if __name__ == "__main__":
    # Once for all ranks: what each would import is most of a small job's time.
    import torch  # noqa: F401

    import backends.pytorch.load  # noqa: F401
    import dslc.program  # noqa: F401

    for job in sys.argv[2:]:
        where, mesh, ranks = job.split(":")
        module, _, function = where.rpartition(".")
        run(Path(sys.argv[1]), getattr(importlib.import_module(module), function), mesh, int(ranks))
