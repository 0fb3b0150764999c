"""What training costs: three times forward, input and weight parts apart."""

from functools import cache
from pathlib import Path

import pytest

from compiler.passes.recompute import Recompute
from compiler.pipeline import Compiled, compile_model
from compiler.report import report
from compiler.training_costs import Cost, Work, coded, costs

MODELS = Path(__file__).parents[2] / "models"
LENGTH = 4096


@cache
def compiled(model: str, deploy: str | None = None) -> Compiled:
    return compile_model(str(MODELS / f"{model}.arch"), deploy=deploy)


@cache
def cost(model: str, deploy: str | None = None) -> Cost:
    return costs(compiled(model, deploy).trained, LENGTH)


def named(whole: Cost, body: str) -> Work:
    """What one run of a body costs by itself."""
    return next(c.own for c, _ in whole.walk() if c.body == body)


def test_deepseek_v3_takes_250_gflop_per_token() -> None:
    """Table 3 of arXiv:2505.09343 says 250; three times the forward pass that `inspect` counts."""
    work = cost("dsv3").total
    assert work.training / LENGTH == pytest.approx(250.5e9, rel=1e-3)
    assert work.input + work.weight == pytest.approx(2 * work.forward, rel=1e-4)
    assert (
        work.forward / LENGTH == report(compiled("dsv3").after("elaborate"), LENGTH).forward_flops
    )


@pytest.mark.parametrize("model", ["llama3", "dsv2", "qwen3_moe"])
def test_training_is_three_times_forward(model: str) -> None:
    work = cost(model).total
    counted = report(compiled(model).after("elaborate"), LENGTH)
    assert work.forward / LENGTH == counted.forward_flops
    assert work.training / LENGTH == pytest.approx(counted.training_flops, rel=1e-4)


def test_a_parameters_product_is_half_input_half_weight() -> None:
    mlp = named(cost("dsv3"), "SwiGLU.call")
    assert mlp.forward == 2 * 3 * 7168 * 18432 * LENGTH
    assert (mlp.input, mlp.weight, mlp.again) == (mlp.forward, mlp.forward, 0)
    assert mlp.saved == 3 * 2 * 18432 * LENGTH  # gate, up and a; its input is the caller's


def test_attention_has_no_weight_part() -> None:
    """Two products forward, four backward, and the scores once more; causal as forward."""
    attention = named(cost("dsv3"), "MLA.call.many.attention")
    assert attention.forward == LENGTH * (LENGTH + 1) * 128 * (192 + 128)
    assert attention.input == 2 * attention.forward
    assert attention.again == LENGTH * (LENGTH + 1) * 128 * 192
    assert (attention.weight, attention.saved) == (0, 0)


def test_a_choice_is_not_trained_through() -> None:
    """DeepSeek-V3.2 picks what it looks at: its indexer has no backward pass of this loss."""
    work = cost("dsv3_2").total
    assert work.input + work.weight < 1.95 * work.forward
    counted = report(compiled("dsv3_2").after("elaborate"), LENGTH)
    assert counted.training_flops == work.training / LENGTH == pytest.approx(248.62e9, rel=1e-4)


def test_what_a_deployment_computes_again() -> None:
    """Section 3.2.3 of arXiv:2412.19437: RMSNorm, the up-projections of MLA, SwiGLU."""
    plain, spared = cost("dsv3").total, cost("dsv3", "pretrain").total
    assert spared.training == plain.training
    assert spared.saved < 0.6 * plain.saved
    up = 2 * 61 * (1536 * 128 * 192 + 512 * 128 * 256) * LENGTH
    assert spared.again - plain.again == pytest.approx(up, rel=1e-6)
    assert named(cost("dsv3", "pretrain"), "SwiGLU.call").saved == 2 * 2 * 18432 * LENGTH


def test_which_products_run_on_quantised_numbers() -> None:
    """Section 3.3.1 of arXiv:2412.19437: forward, dgrad and wgrad of the linear layers are FP8;
    embedding, output head, gating and attention are not."""
    both = compiled("dsv3", "pretrain")
    whole = costs(both.trained, LENGTH, coded=coded(both.after("select-fp8")))
    found = {c.body: (c.coded, c.own) for c, _ in whole.walk()}
    fp8, own = found["SwiGLU.1.call"]
    assert (fp8.forward, fp8.input, fp8.weight) == (own.forward, own.input, own.weight)
    for body in ("DeepSeekV3.main", "MoE.call", "MLA.call.many.attention"):
        assert not any(found[body][0].all), body
    linear = sum(c.coded.training * times for c, times in whole.walk())
    assert 0.85 < linear / whole.total.training < 0.92


def test_a_layer_computed_again_saves_its_input() -> None:
    """Activation checkpointing: a layer's forward pass once more, and 14 KB of each token."""
    program = compiled("dsv3").after("recognise")
    layers = frozenset({"Dense.call", "Sparse.call"})
    plain, again = cost("dsv3").total, costs(program, LENGTH, again=Recompute(bodies=layers)).total
    layer = next(c.total for c, _ in cost("dsv3").walk() if c.body == "Sparse.call")
    assert again.training == plain.training
    assert again.saved < 0.1 * plain.saved
    assert 0.9 < (again.again - plain.again) / (58 * layer.forward) < 1.1


def test_a_use_computed_again_saves_nothing_inside() -> None:
    program = compiled("dsv3").after("recognise")
    use = Recompute(uses=frozenset({("Sparse.call", "mlp")}))
    plain, again = cost("dsv3").total, costs(program, LENGTH, again=use).total
    mlp = next(c.total for c, _ in cost("dsv3").walk() if c.body == "MoE.call")
    assert again.saved == plain.saved - 58 * mlp.saved
    assert again.again == pytest.approx(plain.again + 58 * mlp.forward, rel=1e-3)


def test_the_table_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "differentiate.md").read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line.startswith("| dsv") or "| llama" in line[:8]]
    assert len(lines) == 4
    for line in lines:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        model, _, deploy = name.partition(" ")
        work = cost(model, deploy.strip("`") or None).total
        flops = [work.forward, work.input, work.weight, work.training, work.again]
        wanted = [f"{f / LENGTH / 1e9:.1f}" for f in flops] + [f"{work.saved / LENGTH / 1e3:,.0f}"]
        assert cells == wanted, name
