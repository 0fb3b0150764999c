"""``dslc run --nproc N``: the same command as N processes of this machine, through torchrun's
launcher; and what to say when one of them ends before its time."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backends.pytorch.faults import TOLD

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``dslc`` with these arguments in so many processes.

    Returns:
        0, or 1 if one of them failed: one message says which, and why.
    """
    logging.disable(logging.CRITICAL)  # the message is ours
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="dslc-run-") as folder:
        told = Path(folder) / "told"
        _settings(processes, told)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="dslc",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            rdzv_configs={"timeout": 60},
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
        )
        command = (sys.executable, "-m", "dslc", *arguments)
        try:
            elastic_launch(config, command[0])(*command[1:])
            return 0
        except ChildFailedError as error:
            if not told.exists():
                print(f"error: {_said(error.failures)}", file=sys.stderr)
            return 1


def _settings(processes: int, told: Path) -> None:
    """What the processes find in their environment."""
    os.environ[TOLD] = str(told)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))
    # Ranks of one machine find each other without its name being known anywhere.
    if "GLOO_SOCKET_IFNAME" not in os.environ and Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def _said(failures: dict[int, ProcessFailure]) -> str:
    """Of the ranks that failed, the one that failed by itself: the others were ended for it."""
    ended = -signal.SIGTERM
    own = {r: f for r, f in failures.items() if f.exitcode not in (ended, 1)} or failures
    rank = min(own, key=lambda r: (own[r].timestamp, r))
    failure = own[rank]
    if failure.exitcode < 0:
        how = f"was ended by {signal.Signals(-failure.exitcode).name}"
    else:
        how = f"ended with status {failure.exitcode}"
    return f"rank {rank} (process {failure.pid}) {how}"
