"""``kernels.py``: the text of all kernels of a model."""

from __future__ import annotations

from collections.abc import Iterable

from backends.triton.kernel import Kernel, Operator

PRELUDE = '''\
import functools

import torch
import triton
import triton.language as tl


def pick(configs, count):
    """The first configuration that is meant for so many rows."""
    for upto, config in configs:
        if upto is None or count <= upto:
            return config


def dense(launch):
    """Tensors that are views with gaps are copied first; others are passed as they are."""

    @functools.wraps(launch)
    def call(*args, **options):
        args = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in args]
        return launch(*args, **options)

    return call
'''


def kernels_text(operators: Iterable[Operator], about: str, more: Iterable[str] = ()) -> str:
    """The text of ``kernels.py``.

    Args:
        about: the module's docstring, one line or more.
        more: lines that bring functions of other files in.

    Raises:
        ValueError: two operators have one name and different text.
    """
    written: dict[str, str] = {}
    parts = [f'"""{about}"""\n\n{PRELUDE}', *(["\n".join(more) + "\n"] if more else [])]
    for operator in operators:
        for kernel in operator.kernels:
            for name, text in kernel.helpers:
                parts += _once(written, name, f"{text.strip()}\n")
            parts += _once(written, kernel.name, f"{_table(kernel)}\n\n{kernel.source.strip()}\n")
        decorator = "@dense\n" if operator.dense else ""
        parts += _once(written, operator.name, f"{decorator}{operator.launcher.strip()}\n")
    return "\n\n".join(parts)


def _once(written: dict[str, str], name: str, text: str) -> list[str]:
    if name in written:
        if written[name] != text:
            raise ValueError(f"two kernels are called {name}")
        return []
    written[name] = text
    return [text]


def _table(kernel: Kernel) -> str:
    rows = [f"    ({config.upto}, dict({config.text()}))," for config in kernel.configs]
    return "\n".join([f"{kernel.name}_configs = (  # upto this count, else None", *rows, ")"])
