"""What a CPU can do, so that code compiled for one is not run on another."""

from __future__ import annotations

from pathlib import Path

FAMILIES = ("avx", "amx", "fma", "f16c", "bmi", "sve", "asimd", "bf16", "i8mm")


def features() -> tuple[str, ...]:
    """The instructions that compilers use where they are, sorted."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(v for v in values.split() if v.startswith(FAMILIES)))
    import torch

    return (torch.backends.cpu.get_cpu_capability(),)
