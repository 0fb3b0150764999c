"""Which Triton is installed, if one that these kernels can use."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from compiler.errors import UserError

OLDEST = (3, 6)  # tensor descriptors for all GPUs here, loops that keep what does not change


@cache
def triton_version() -> str:
    """The version of Triton.

    Raises:
        UserError: there is none, or one that is too old.
    """
    try:
        found = version("triton")
    except PackageNotFoundError:
        raise UserError(
            "kernels for a GPU take Triton, which is not installed: pip install 'dslc[triton]'"
        ) from None
    oldest = ".".join(map(str, OLDEST))
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise UserError(f"kernels for a GPU take Triton {oldest} or newer, and this is {found}")
    return found
