"""Compiling for a GPU: which one, and what is shown of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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


def resources(generated: Generated, compiled: Sequence[Binary]) -> dict[str, Any]:
    """What each binary takes, what a call of its operator moves, and what no kernel computes."""
    of = {k.name: operator for operator in generated.operators for k in operator.kernels}
    rows = []
    for binary in compiled:
        operator = of[binary.kernel.name]
        cost = operator.traffic(operator.shown)
        rows.append(
            {
                "kernel": binary.kernel.name,
                "tiles": binary.config.text(),
                "sizes": dict(operator.shown),
                "products": dict(binary.products),
                "registers": binary.registers,
                "spills": binary.spills,
                "shared": binary.shared,
                "bytes": cost.bytes,
                "least": cost.least,
                "bound": cost.bound,
                "flops": cost.flops,
                "replaces": binary.replaces.text() if binary.replaces else None,
                "because": binary.because,
            }
        )
    missed = [
        {"op": f.op, "body": f.body, "place": f.place, "text": f.text} for f in generated.fallbacks
    ]
    return {"kernels": rows, "fallbacks": missed}


def show_kernels(generated: Generated, compiled: Sequence[Binary]) -> None:
    """The same as a table, and a line for each node that torch computes."""
    found = resources(generated, compiled)
    rows = [
        [
            row["kernel"],
            row["tiles"],
            ", ".join(f"{name}={size}" for name, size in row["sizes"].items()),
            " ".join(f"{name}:{n}" for name, n in sorted(row["products"].items())) or "-",
            str(row["registers"]),
            str(row["spills"]),
            f"{row['shared']:,}",
            large(row["bytes"]),
            f"{row['bytes'] / row['bound']:.2f}" if row["bound"] else "-",
            large(row["flops"]),
        ]
        for row in found["kernels"]
    ]
    headings = ["kernel", "tiles", "at", "products"]
    numbers = ["registers", "spills", "shared", "bytes", "of bound", "FLOP"]
    if rows:
        table([*headings, *numbers], rows, left=len(headings))
    for row in found["kernels"]:
        if row["because"]:
            tiles = row["replaces"] or row["tiles"]
            instead = f"; {row['tiles']} instead" if row["replaces"] else ""
            print(f"tiling: {row['kernel']} with {tiles}: {row['because']}{instead}")
    for missed in found["fallbacks"]:
        print("fallback: {op} in {body}  {place}  {text}".format(**missed))
    if rows and not found["fallbacks"]:
        print("fallback: none")
