"""The loss of a training deployment: what it is, its gradients, and what it refuses."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from compiler.equivalence import difference
from compiler.errors import UserError
from compiler.gradients import gradients
from compiler.interpret import Interpreter, random_weights
from compiler.ir import Program
from compiler.passes import differentiate, losses
from compiler.pipeline import compile_model
from compiler.shrink import shrink, shrunken
from compiler.text import parse, program_text, same
from compiler.training_costs import costs
from compiler.verify import problems

MODELS = Path(__file__).parents[2] / "models"
LINEAR = """
import std.formats
index t : time
model M {
  index d : 6, w : 9
  param embed[w, d]
  def main(token[t] of w) -> logits[t,w] { logits[t,w] = embed[w,d] * embed[token[t], d] }
  def norm(token[t] of w) -> total[t] { total[t] = sum[d](embed[token[t], d]) }
}
deploy toy of M { mesh dp = 2  shard batch -> dp  train batch = 4, sequence = 8WEIGHT }
"""


def toy(folder: Path, weight: str = "") -> Program:
    file = folder / "toy.arch"
    file.write_text(LINEAR.replace("WEIGHT", weight), encoding="utf-8")
    return compile_model(str(file), deploy="toy").after("differentiate")


def test_deepseek_v3_with_multi_token_prediction() -> None:
    """`deploy pretrain` trains main + 0.3 mtp: equations 24 and 25 of arXiv:2412.19437."""
    before = compile_model(str(MODELS / "dsv3.arch"), deploy="pretrain").trained
    before = shrunken(before, {**shrink(before), "vocab": 7})
    program = differentiate.run(before)
    assert not problems(program)
    assert same(parse(program_text(program)), program)
    weights = random_weights(before, 0, torch.float64)
    leaves = {path: w.clone().requires_grad_() for path, w in weights.items()}
    tokens = torch.randint(7, (9,), generator=torch.Generator().manual_seed(1))
    plain = Interpreter(before, leaves, torch.float64)
    # Positions that have both targets: the last two tokens are targets only.
    first = F.cross_entropy(plain.run("main", {"token": tokens[:-2]}), tokens[1:-1])
    second = F.cross_entropy(plain.run("mtp", {"token": tokens[:-1]}), tokens[2:])
    loss = first + 0.3 * second
    loss.backward()
    with torch.no_grad():
        grad = torch.tensor(1.0, dtype=torch.float64)
        runner = Interpreter(program, weights, torch.float64)
        found = gradients(runner, "loss", {"token": tokens, "grad": grad})
    assert difference(found.result, loss.detach()) < 1e-12
    for path, gradient in found.parameters.items():
        wanted = leaves[path].grad
        wanted = torch.zeros_like(gradient) if wanted is None else wanted
        assert difference(gradient, wanted) < 1e-10, path


def test_what_entries_share_is_computed_once() -> None:
    before = compile_model(str(MODELS / "dsv3.arch")).after("recognise")
    both = costs(losses.add(before, {}), 4096, "loss").total
    main = costs(before, 4096).total
    layer = next(c for c, _ in costs(before, 4096).walk() if c.body == "Sparse.call").total
    extra = both.forward - main.forward  # one more layer, the product of W_eh, and the head
    assert extra == pytest.approx(layer.forward + 2 * 4096 * 7168 * (2 * 7168 + 129280), rel=1e-3)


def test_weights_leave_entries_out(tmp_path: Path) -> None:
    program = toy(tmp_path, ", weight[norm] = 0, weight[main] = 2")
    assert list(program.entries) == ["main", "norm", "loss", "loss.gradients"]
    shown = [(i.name, i.shift_of, i.shift) for i in program.entries["loss"].inputs]
    assert shown == [("token", None, 0), ("target_1", "token", 1)]


def test_an_entry_that_predicts_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        toy(tmp_path)
    assert str(error.value) == (
        "entry 'norm': its result predicts no input: a training deployment's loss is the "
        "cross-entropy of entries that give numbers over the places of one of their inputs; "
        "weight[norm] = 0 leaves it out"
    )


def test_no_loss_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        toy(tmp_path, ", weight[norm] = 0, weight[main] = 0")
    assert str(error.value) == "a training deployment leaves out the loss of every entry"
