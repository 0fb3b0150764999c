"""Modules that are made of text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def imported_as(name: str, module: ModuleType | None) -> Iterator[None]:
    """Meanwhile, importing the name gives the module, if there is one."""
    if module is None:
        yield
        return
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
