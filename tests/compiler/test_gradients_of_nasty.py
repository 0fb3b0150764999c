"""Gradients of models that are hard on a compiler equal autograd's through their meaning, written
out in plain torch (``tests/nasty``): nothing of this project computes in the oracle."""

from pathlib import Path

import pytest
import torch

from compiler.equivalence import difference
from compiler.gradients import gradients
from compiler.interpret import Interpreter, random_weights
from compiler.passes import differentiate
from compiler.pipeline import compile_model
from compiler.verify import problems
from tests.nasty import MODELS


@pytest.mark.filterwarnings("ignore:Converting a tensor")  # a reference sorts by values
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_the_reference(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    file = tmp_path / "model.arch"
    file.write_text(model.text, encoding="utf-8")
    program = compile_model(str(file)).after("recognise")
    derived = differentiate.run(program)
    assert not problems(derived)
    weights = random_weights(program, 3, torch.float64)
    body = program.bodies[program.entries["main"].body]
    (token,) = body.inputs
    assert token.type.of is not None
    vocab = token.type.of.size.at(program.sizes)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (7,), generator=random)
    leaves = {path: w.clone().requires_grad_() for path, w in weights.items()}
    result = model.references["main"](leaves, tokens)
    grad = torch.randn(result.shape, generator=random, dtype=torch.float64)
    (result * grad).sum().backward()
    runner = Interpreter(derived, weights, torch.float64)
    with torch.no_grad():
        found = gradients(runner, "main", {token.attrs["name"]: tokens, "grad": grad})
    assert difference(found.result, result.detach()) < 1e-9
    for path, gradient in found.parameters.items():
        wanted = leaves[path].grad
        wanted = torch.zeros_like(gradient) if wanted is None else wanted
        assert difference(gradient, wanted) < 1e-9, path
