"""A program for a GPU: ``model.py``, ``kernels.py``, and the kernels' binaries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from backends.pytorch.emit.module import emit
from backends.triton import tuning
from backends.triton.ahead import Binary
from backends.triton.fit import adopted, fitting
from backends.triton.installed import triton_version
from backends.triton.kernel import Operator
from backends.triton.own import Extern
from backends.triton.patterns.coded import format_of
from backends.triton.patterns.tokens import samplers
from backends.triton.select import Fallback, Selection
from backends.triton.targets import TARGETS, Target
from backends.triton.write import kernels_text
from compiler.coding import Coding
from compiler.errors import UserError
from compiler.ir import Program

INDEX = "kernels/index.json"
CODE = "kernels.py"


@dataclass(frozen=True)
class Generated:
    """What is written for a GPU.

    Attributes:
        about: the docstring of ``kernels.py``.
        model, kernels: the texts of ``model.py`` and ``kernels.py``.
        operators: the functions of ``kernels.py``.
        fallbacks: what torch computes.
        externs: functions of the user's, and the texts of their files.
        sampling: of the operators, those that choose tokens: ``greedy``, ``drawn``.
    """

    target: Target
    dtype: str
    about: str
    model: str
    kernels: str
    operators: tuple[Operator, ...]
    fallbacks: tuple[Fallback, ...]
    sampling: Mapping[str, str] = field(default_factory=dict)
    externs: Mapping[Extern, str] = field(default_factory=dict)


def generate(program: Program, target: Target, dtype: str) -> Generated:
    """Choose the kernels of a program and write its code.

    Args:
        dtype: of activations: bfloat16, float16 or float32.

    Raises:
        UserError: the deployment asks for products that the GPU does not have; the message names
            the place in the source.
    """
    _refuse_formats(program, target)
    selection = Selection(target, dtype)
    model = emit(program, selection)
    choosing = samplers(program, target, dtype)
    for operator in choosing.values():
        selection.use(operator)
    table = tuning.find(target)
    operators = tuple(table.apply(op) if table else op for op in selection.operators.values())
    about = f"The kernels of {program.name} for {target.name}, activations {dtype}."
    return Generated(
        target,
        dtype,
        about,
        model,
        kernels_text(operators, about, [one.line() for one in selection.externs]),
        operators,
        tuple(selection.fallbacks),
        {name: operator.name for name, operator in choosing.items()},
        dict(selection.externs),
    )


def _refuse_formats(program: Program, target: Target) -> None:
    """Products of 8-bit codes need a GPU that has them."""
    if target.fp8:
        return
    for graph in program.bodies.values():
        for node in graph:
            operands = [graph[name].type.dtype for name in node.inputs]
            coding = graph[node.inputs[0]].type.coding if node.inputs else None
            if node.op == "scaled_contract" and operands == ["coded", "coded"] and _read(coding):
                rules = program.deployment.precision if program.deployment else ()
                place = rules[0].span if rules else node.span
                raise UserError(
                    f"{target.name} does not multiply {coding}, which "
                    f"{place or 'the deployment'} asks for; leave out --deploy, or compile for "
                    f"{', '.join(name for name, t in TARGETS.items() if t.fp8)}"
                )


def _read(coding: Coding | None) -> bool:
    """Do kernels of any GPU read such codes? Others are left to torch on all."""
    try:
        format_of(coding)
    except ValueError:
        return False
    return True


def binaries(generated: Generated, progress: Callable[[str], None]) -> list[Binary]:
    """Every kernel in every configuration that its launcher may pick, compiled; where one does not
    fit the GPU, the next that does.

    Raises:
        UserError: Triton is missing, or cannot compile one; the message names it.
    """
    kernels = {k.name: k for operator in generated.operators for k in operator.kernels}
    wanted = {(k.name, c.text()): (k, c) for k in kernels.values() for c in k.configs}
    return fitting(wanted.values(), generated.target, progress)


def files(generated: Generated, compiled: list[Binary]) -> dict[str, bytes]:
    """The compiled directory's files: texts, binaries, and the index that ``binaries.py`` reads."""
    operators = [adopted(operator, compiled) for operator in generated.operators]
    lines = [one.line() for one in generated.externs]
    out = {CODE: kernels_text(operators, generated.about, lines).encode()}
    out |= {f"{one.module}.py": text.encode() for one, text in generated.externs.items()}
    rows = []
    numbers: dict[str, int] = {}
    for binary in compiled:
        number = numbers[binary.kernel.name] = numbers.get(binary.kernel.name, -1) + 1
        stem = f"kernels/{binary.kernel.name}.{number}"
        out[f"{stem}.{binary.target.binary}"] = binary.image.read_bytes()
        out[f"{stem}.json"] = binary.metadata.read_bytes()
        rows.append(
            {
                "kernel": binary.kernel.name,
                "file": f"{stem}.{binary.target.binary}",
                "metadata": f"{stem}.json",
                "arguments": [[a.name, a.type, a.aligned] for a in binary.kernel.arguments],
                "constants": dict(binary.config.constants),
                "num_warps": binary.config.num_warps,
                "num_stages": binary.config.num_stages,
                "registers": binary.registers,
                "spills": binary.spills,
                "shared": binary.shared,
                "products": dict(binary.products),
            }
        )
    index = {
        "target": generated.target.name,
        "dtype": generated.dtype,
        "triton": triton_version(),
        "sampling": dict(generated.sampling),
        "externs": sorted({one.module for one in generated.externs}),
        "kernels": rows,
    }
    out[INDEX] = (json.dumps(index, indent=1) + "\n").encode()
    return out
