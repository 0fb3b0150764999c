"""How much memory there is, asked before any is taken."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.errors import UserError

if TYPE_CHECKING:
    import torch

UNITS = ("B", "KB", "MB", "GB", "TB", "PB")
MOST_ON_THE_HEAP = 32 << 20  # what glibc allows


class MemoryNeeded(UserError):
    """Something does not fit; the message says what, and both numbers."""


def require(what: str, needed: int, device: torch.device | str) -> None:
    """Compare bytes needed with bytes available. Of the "cpu", by its name, it needs no torch.

    Raises:
        MemoryNeeded: the device has less.
    """
    there = available(device)
    if there is not None and needed > there:
        raise MemoryNeeded(f"{what} needs {shown(needed)}; {device} has {shown(there)} available")


def keep_freed() -> bool:
    """Let this process keep memory that it frees, for the next intermediate results.

    Otherwise glibc gives large results back to the system and takes them anew, page by page, which
    costs a prefill on a CPU a quarter of its time. For programs to call, before they load a model:
    it concerns the whole process.

    Returns:
        Whether the C library knows how.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return False
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    return bool(mallopt(trim, (1 << 31) - 1)) and bool(mallopt(mmap, MOST_ON_THE_HEAP))


def available(device: torch.device | str) -> int | None:
    """Bytes that can be allocated on a device; None where the system does not say."""
    kind = device if isinstance(device, str) else device.type
    if kind == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if kind != "cpu":
        return None
    limits = [n for n in (_meminfo("MemAvailable"), _control_group()) if n is not None]
    return min(limits, default=None)


def shown(count: int) -> str:
    """1,342,177,280,000 is "1,342.2 GB"."""
    value, unit = float(count), 0
    while value >= 10_000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:,.1f} {UNITS[unit]}" if unit else f"{count:,} B"


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _control_group() -> int | None:
    """What a container may still take; its files in the page cache can be given up."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - used + int(stat.get("file", 0))
    except (OSError, ValueError):
        return None
