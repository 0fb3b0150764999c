"""Compiling for a GPU: which one, and what is shown of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compiler.errors import UserError
from dslc.terminal import large, table

if TYPE_CHECKING:
    from backends.triton.ahead import Binary
    from backends.triton.generate import Generated
    from backends.triton.targets import Target

CPU = "cpu"
THIS = "cuda"


def resolve(name: str) -> Target | None:
    """The GPU that ``--target`` names; None for the CPU.

    Raises:
        UserError: there is none of that name, or ``cuda`` where torch sees no GPU.
    """
    if name == CPU:
        return None
    from backends.triton.targets import TARGETS

    if name == THIS:
        name = _here()
    if name not in TARGETS:
        sold = ", ".join(f"{target.name} ({target.sold})" for target in TARGETS.values())
        raise UserError(
            f"there is no target '{name}'; there is {CPU}, {THIS} (the GPU of this machine), {sold}"
        )
    return TARGETS[name]


def _here() -> str:
    import torch

    from backends.triton.targets import TARGETS

    if not torch.cuda.is_available():
        raise UserError(
            "--target cuda compiles for the GPU of this machine, and torch sees none; name the GPU "
            f"instead: {', '.join(TARGETS)}"
        )
    if torch.version.hip:
        name = torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    else:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if name not in TARGETS:
        raise UserError(
            f"this machine's GPU is {name}, which there are no kernels for; there are for "
            f"{', '.join(TARGETS)}"
        )
    return name


def show_kernels(generated: Generated, compiled: Sequence[Binary]) -> None:
    """The table of kernels: what each takes, what it moves, and what no kernel computes."""
    rows = []
    of = {k.name: operator for operator in generated.operators for k in operator.kernels}
    for binary in compiled:
        operator = of[binary.kernel.name]
        cost = operator.traffic(operator.shown)
        products = " ".join(f"{name}:{count}" for name, count in sorted(binary.products.items()))
        rows.append(
            [
                binary.kernel.name,
                binary.config.text(),
                ", ".join(f"{name}={size}" for name, size in operator.shown.items()),
                products or "-",
                str(binary.registers),
                str(binary.spills),
                f"{binary.shared:,}",
                large(cost.bytes),
                f"{cost.bytes / cost.bound:.2f}" if cost.bound else "-",
                large(cost.flops),
            ]
        )
    headings = ["kernel", "tiles", "at", "products"]
    numbers = ["registers", "spills", "shared", "bytes", "of bound", "FLOP"]
    if rows:
        table([*headings, *numbers], rows, left=len(headings))
    for missed in generated.fallbacks:
        print(f"fallback: {missed.op} in {missed.body}  {missed.place}  {missed.text}")
