"""Gradients of models that are hard on a compiler equal autograd's through their meaning, written
out in plain torch (``tests/nasty``): nothing of this project computes in the oracle. Random models
(``tests/generated.py``) have no such meaning: there autograd goes through the interpreter."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings

from compiler.equivalence import difference
from compiler.gradients import gradients
from compiler.interpret import Interpreter, random_weights
from compiler.passes import differentiate
from compiler.passes.recompute import NOTHING, Recompute
from compiler.pipeline import compile_model
from compiler.verify import problems
from dsl.diagnostics import DiagnosticError
from tests.generated import models
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


@settings(
    max_examples=5, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(models())
def test_gradients_of_a_random_model(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Against autograd through the interpreter; saved as usual, and with everything again."""
    file = tmp_path_factory.mktemp("random") / "model.arch"
    file.write_text(text, encoding="utf-8")
    try:
        program = compile_model(str(file)).after("recognise")
    except DiagnosticError:
        reject()  # the generator knows the language's rules nearly
    weights = random_weights(program, 0, torch.float64)
    leaves = {path: w.clone().requires_grad_() for path, w in weights.items()}
    token = torch.tensor([3, 1, 4, 1, 0, 2])
    result = Interpreter(program, leaves, torch.float64).run("main", {"token": token})
    random = torch.Generator().manual_seed(0)
    grad = torch.randn(result.shape, generator=random, dtype=torch.float64)
    (result * grad).sum().backward()
    for again in (NOTHING, Recompute(bodies=frozenset(program.bodies))):
        derived = differentiate.differentiate(program, ["main"], again).program
        assert not problems(derived)
        with torch.no_grad():
            runner = Interpreter(derived, weights, torch.float64)
            found = gradients(runner, "main", {"token": token, "grad": grad})
        for path, gradient in found.parameters.items():
            own = leaves[path].grad
            wanted = torch.zeros_like(gradient) if own is None else own
            assert (gradient - wanted).abs().max() <= 1e-7 * (1 + wanted.abs().max()), path
