"""Kernels of a user's own, held against the equations that they stand for (``--verify``)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from backends.triton.own import Extern, serving
from backends.triton.targets import Target
from compiler.errors import UserError
from compiler.interpret import Interpreter
from compiler.ir import Entry, EntryInput, Graph, Node, Program

ROWS = (1, 5)  # of what is lifted
NEAR = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}
INTERPRETED = Path(__file__).with_name("interpreted.py")  # mends what the interpreter rounds
CALLING = """
import importlib.util, sys, torch

def loaded(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

there = torch.cuda.is_available()
if not there:
    loaded("interpreted", sys.argv[5]).install()
given = [x.to("cuda" if there else "cpu") for x in torch.load(sys.argv[3])]
torch.save(getattr(loaded("own", sys.argv[1]), sys.argv[2])(*given).cpu(), sys.argv[4])
"""


def verify(program: Program, target: Target, dtype: str) -> list[str]:
    """Run each kernel that serves a target on random numbers, on this GPU or, without one, in
    Triton's interpreter.

    Returns:
        The names of those that are what their equations say.

    Raises:
        UserError: one fails, or is off; the message has its place and how far.
    """
    held = []
    for body in program.bodies.values():
        for node in body:
            found = serving(node, target.name) if node.op == "extern" else None
            if found is not None and (at := f"{found.path}:{found.function}") not in held:
                _held(program, body, node, found, dtype)
                held.append(at)
    return held


def _held(program: Program, body: Graph, node: Node, found: Extern, dtype: str) -> None:
    graph = program.bodies[node.attrs["body"]]
    entry = Entry("main", graph.name, tuple(EntryInput(n.attrs["name"]) for n in graph.inputs))
    alone = replace(program, entries={"main": entry})
    draw = torch.Generator(device="cpu").manual_seed(0)
    for count in ROWS:
        given: list[Tensor] = []
        for operand in graph.inputs:
            if operand.type.dtype not in ("act", "f32"):
                return  # whole numbers: which ones may be, the equations do not say
            sizes = [program.size(d) if d.kind == "plain" else count for d in operand.type.dims]
            drawn = torch.randn(sizes, generator=draw, device="cpu")
            given.append(drawn.to(getattr(torch, _dtype(operand, dtype))))
        named = {n.attrs["name"]: x.float() for n, x in zip(graph.inputs, given, strict=True)}
        wanted = Interpreter(alone, {}, sizes={"rows": count}).run("main", named)
        *own, result = node.attrs["own"]
        flat = [
            x.flatten(0, x.ndim - len(mine) - 1) if x.ndim > len(mine) + 1 else x
            for x, mine in zip(given, own, strict=True)
        ]
        made = _called(found, flat, node)
        place = f"{node.span}: kernel {found.path}:{found.function}"
        expected = wanted.float().reshape(-1, *wanted.shape[wanted.ndim - len(result) :])
        if made.shape != expected.shape:
            raise UserError(f"{place} gives {list(made.shape)}, not {list(expected.shape)}")
        off = float((made.float() - expected).norm() / expected.norm().clamp(min=1e-30))
        if not off <= NEAR[_dtype(graph.result, dtype)]:
            raise UserError(
                f"{place} is not what its equations say: {off:.2g} off, relative to their "
                f"2-norm, for {', '.join(str(list(x.shape)) for x in flat)}"
            )


def _dtype(node: Node, act: str) -> str:
    return act if node.type.dtype == "act" else "float32"


def _called(found: Extern, given: list[Tensor], node: Node) -> Tensor:
    """What the kernel makes of tensors, in a process of its own: it may do anything."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "given.pt", Path(folder) / "made.pt"
        torch.save([x.contiguous() for x in given], before)
        command = [sys.executable, "-c", CALLING, str(found.path), found.function]
        done = subprocess.run(
            [*command, str(before), str(after), str(INTERPRETED)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not after.exists():
            last = (done.stderr.strip().splitlines() or ["it gave no result"])[-1]
            raise UserError(f"{node.span}: kernel {found.path}:{found.function} failed: {last}")
        made: Tensor = torch.load(after)
        return made
