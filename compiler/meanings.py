"""Where an op's reference semantics stand: a row of the spec table names them, and this finds them.

Most are functions of ``compiler/semantics.py``. Ops that belong together may have a module of their
own beside it, which their rows name: ``semantics_bundles.item``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from compiler.ir import Node

if TYPE_CHECKING:
    from compiler.interpret import Frame
    from compiler.semantics import Named

    Meaning = Callable[[Node, list[Named], Frame], Named]


def meaning(name: str) -> Meaning:
    """The function that a row names. Imports torch.

    Raises:
        AttributeError: there is none.
    """
    module, _, function = name.rpartition(".")
    found: Meaning = getattr(import_module(f"compiler.{module or 'semantics'}"), function)
    return found
