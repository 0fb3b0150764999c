"""Backward graphs of the shipped models: their gradients are those of automatic differentiation
through the reference interpreter, and they are no larger for more layers or experts."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compiler.equivalence import _inputs, difference
from compiler.gradients import Gradients, gradients
from compiler.interpret import Interpreter, random_weights
from compiler.ir import Program
from compiler.passes import differentiate
from compiler.passes.recompute import NOTHING, Recompute, of
from compiler.pipeline import compile_model
from compiler.shrink import shrink, shrunken
from compiler.text import parse, program_text, same
from compiler.verify import problems
from dsl.constants import Choices

MODELS = Path(__file__).parents[2] / "models"


@cache
def after(model: str, stage: str, **sizes: int) -> Program:
    return compile_model(str(MODELS / f"{model}.arch"), Choices(set=dict(sizes))).after(stage)


def both(
    program: Program, entry: str, again: Recompute = NOTHING
) -> tuple[Gradients, dict[str, Tensor], dict[str, Tensor]]:
    """The backward graph's gradients on a small instance in float64; autograd's of the parameters
    and of the inputs."""
    small = shrink(program)
    program = shrunken(program, small)
    derived = differentiate.differentiate(program, [entry], again).program
    assert not problems(derived)
    weights = random_weights(program, 0, torch.float64)
    leaves = {path: w.clone().requires_grad_() for path, w in weights.items()}
    inputs = _inputs(program, entry, small, 0)
    floats = {k: v.requires_grad_() for k, v in inputs.items() if v.is_floating_point()}
    result = Interpreter(program, leaves, torch.float64).run(entry, inputs)
    grad = torch.randn(
        result.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    (result * grad).sum().backward()
    with torch.no_grad():
        runner = Interpreter(derived, weights, torch.float64)
        found = gradients(runner, entry, {**inputs, "grad": grad})
    assert difference(found.result, result.detach()) < 1e-12
    wanted = {k: leaves[k].grad for k in found.parameters}
    zeros = {k: torch.zeros_like(v) for k, v in found.parameters.items()}
    filled = {k: zeros[k] if g is None else g for k, g in wanted.items()}
    return found, filled, {k: v.grad for k, v in floats.items() if v.grad is not None}


def assert_autograd(program: Program, entry: str, least: float, again: Recompute = NOTHING) -> None:
    """Every parameter's gradient is autograd's, and this share of them is not zero."""
    found, wanted, _ = both(program, entry, again)
    for path, gradient in found.parameters.items():
        assert difference(gradient, wanted[path]) < 1e-10, path
    assert sum(bool(g.any()) for g in wanted.values()) >= least * len(wanted)


@pytest.mark.parametrize(
    ("model", "entry", "least"),
    [
        ("llama3", "main", 1),
        ("qwen2_5", "main", 1),
        ("mixtral", "main", 0.7),
        ("qwen3_moe", "main", 0.7),
        ("dsv2", "main", 0.7),
        ("dsv3", "main", 0.5),  # less the layer of multi-token prediction
        ("dsv3", "mtp", 0.7),
        ("dsv3_2", "main", 0.5),
        ("qwen3_next", "main", 0.9),  # a recurrence, and a convolution over tokens
    ],
)
def test_gradients_are_autograds(model: str, entry: str, least: float) -> None:
    assert_autograd(after(model, "recognise"), entry, least)


@pytest.mark.parametrize("stage", ["elaborate", "lifetimes"])
def test_any_pass_may_come_before(stage: str) -> None:
    assert_autograd(after("dsv3", stage), "main", 0.5)


def test_a_deployment_computes_values_again() -> None:
    program = compile_model(str(MODELS / "dsv3.arch"), deploy="pretrain").trained
    again = of(program, program.deployment)
    assert {label for _, label in again.values} == {"q", "k", "val", "a"}
    assert "RMSNorm.call" in again.bodies
    assert_autograd(program, "main", 0.5, again)


@pytest.mark.parametrize(
    "again",
    [
        Recompute(bodies=frozenset({"Sparse.call", "Dense.call"})),  # layers, each from its input
        Recompute(bodies=frozenset({"SwiGLU.1.call", "MoE.call.experts"})),
        Recompute(uses=frozenset({("Sparse.call", "attn"), ("DeepSeekV3.main", "")})),
    ],
    ids=["layers", "experts", "uses"],
)
def test_whole_blocks_are_computed_again(again: Recompute) -> None:
    program = after("dsv3", "recognise")
    assert_autograd(program, "main", 0.5, again)
    less, more = (
        sum(
            len(parts.saved)
            for parts in differentiate.differentiate(program, ["main"], r).parts.values()
        )
        for r in (again, NOTHING)
    )
    assert less < more


def test_the_text_is_read_back() -> None:
    program = after("dsv3", "differentiate")
    text = program_text(program)
    assert same(parse(text), program)
    assert program_text(parse(text)) == text


def test_layers_and_experts_do_not_make_it_larger() -> None:
    few = program_text(after("dsv3", "differentiate", layers=61, experts=256)).split("\n")
    many = program_text(after("dsv3", "differentiate", layers=610, experts=512)).split("\n")
    new = [line for line in many if line not in few]
    assert sorted(new) == ["const experts = 512", "const layers = 610"]
    assert len(few) == len(many)
