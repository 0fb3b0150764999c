"""Small sources, compiled and run: what the tests of ``elaborate`` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from compiler.interpret import Interpreter, random_weights
from compiler.ir import Program
from compiler.pipeline import compile_model
from dsl.diagnostics import DiagnosticError

BLOCKS = """
import std.rotary

index t : time, s : history t

block Linear[o, i] {
  param W[o, i]
  param b[o]
  def (x[i]) -> y[o] { y[o] = W[o,i] * x[i] + b[o] }
}
block SoFar[d] {
  def (x[t,d]) -> y[t,d] {
    cached past[s,d] = x[t,d]
    y[t,d] = sum[s](where(position[s] <= position[t], past[s,d], 0))
  }
}
fn swapped[j](x[j]) -> y[j] {
  index p : size(j) / 2, o : 2
  y[(p,o)] = stack[o](x[(p,1)], -x[(p,0)])
}
fn outer[i, j](a[i], b[j]) -> y[i,j] { y[i,j] = a[i] * b[j] }
fn scaled(a, x) -> y { y = a * x }
"""


@dataclass
class Ran:
    """A program's result in float64, and what went into it."""

    y: Tensor
    program: Program
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    interpreter: Interpreter

    @property
    def x(self) -> Tensor:
        return self.inputs["x"]

    def is_(self, wanted: Tensor) -> None:
        torch.testing.assert_close(self.y, wanted.to(self.y.dtype))

    def linear(self, path: str) -> Callable[[Tensor], Tensor]:
        weight, shift = self.weights[f"{path}.W"], self.weights[f"{path}.b"]
        return lambda x: x @ weight.T + shift


def run(source: str, entry: str = "main") -> Ran:
    """Compile a source and run an entry on five random tokens, elaborated and after all passes."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "model.arch")
        file.write_text(BLOCKS + source, encoding="utf-8")
        compiled = compile_model(str(file))
    program = compiled.after("elaborate")
    weights = random_weights(program, dtype=torch.float64)
    body = program.bodies[program.entries[entry].body]
    made = {i.name for i in program.entries[entry].inputs if i.shift_of}
    random = torch.manual_seed(0)
    given = {}
    for node in body.inputs:
        sizes = program.sizes | {"time": 5}
        shape = [d.size.at(sizes) for d in node.type.dims]
        if node.type.of is not None:
            value = torch.randint(0, node.type.of.size.at(sizes), shape, generator=random)
        else:
            value = torch.randn(shape, generator=random, dtype=torch.float64)
        if node.attrs["name"] not in made:
            given[node.attrs["name"]] = value
    last = Interpreter(compiled.program, weights, torch.float64).run(entry, given)
    interpreter = Interpreter(program, weights, torch.float64)
    y = interpreter.run(entry, given)
    torch.testing.assert_close(y, last)
    return Ran(y, program, weights, given, interpreter)


def model(equations: str, members: str = "", takes: str = "x[t,d]", gives: str = "y[t,d]") -> str:
    """A model of one def, with a few indices and parameters at hand."""
    return f"""
model M {{
  index d : 6, e : 4, h : 2, n : 3, l : 3
  param W[e, d]
  param G[(h, n), d]
  param P[n|h, d]
  param c[d]
  {members}
  def main({takes}) -> {gives} {{ {equations} }}
}}"""


def mistake(source: str) -> str:
    with pytest.raises(DiagnosticError) as error:
        run(source)
    return str(error.value)
