"""Errors while a model runs say which equation of the source they come from."""

import re
from types import ModuleType

import pytest
import torch
from small import SIZES, compiled, prompts

import dslc
from backends.pytorch.places import RunError, located, remember_text, source_path
from backends.pytorch.runtime import Step
from dslc import cli

TOKENS = prompts(1, 4)
MODEL = """\
edition 2026

index t : time
const width = 6

# Says nothing of its neighbours.
block Twice[d] {
  param W[d]
  def (x[t,d]) -> y[t,d] {
    long[t,d] = W[d] * x[t,d]
                + W[d] * tanh(x[t,d])
    y[t,d] = long[t,d] * x[t,d]
  }
}

model Toy {
  index d : width, w : 51, l : 3
  param embed[w, d]
  use layers[l] = Twice[d]
  def main(token[t] of w) -> logits[t,w] {
    logits[t,w] = embed[w,d] * chain[l](layers, embed[token[t], d])
  }
}
"""


def fresh():
    return dslc.load(compiled())


def wrong(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(*shape))


def error_of(model, tokens=TOKENS) -> RunError:
    with pytest.raises(RunError) as caught:
        model(tokens)
    return caught.value


def test_a_wrong_shape_is_told_with_line_block_and_operands():
    model = fresh()
    model.module.layers[2].mlp.shared.W_up = wrong(8, 31)
    error = error_of(model)
    assert str(error) == (
        "mat1 and mat2 shapes cannot be multiplied (4x20 and 31x8)\n"
        "  --> std/ffn.arch:15, in layers[2].mlp.shared\n"
        "   |\n"
        "15 | up[f] = W_up[f,d] * x[d]\n"
        "   |\n"
        "  with x float32 [4, 20], W_up float32 [8, 31]"
    )
    assert (error.place, error.block) == ("std/ffn.arch:15", "layers[2].mlp.shared")
    assert error.equation == "up[f] = W_up[f,d] * x[d]"
    assert type(error.__cause__) is RuntimeError


def test_an_expert_that_fails_is_named_by_its_number():
    model = fresh()
    for expert in model.module.layers[1].mlp.expert:
        expert.W_up = wrong(8, 21)
    error = error_of(model)
    assert error.place == "std/ffn.arch:15" and error.block.startswith("layers[1].mlp.expert[")
    assert "15 | up[f] = W_up[f,d] * x[d]\n" in str(error)


def test_an_operation_that_raises_has_its_kind_and_its_line(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a cog is loose")

    model = fresh()
    monkeypatch.setitem(type(model.module).main.__globals__, "experts", broken)
    error = error_of(model)
    first, place, *_ = str(error).splitlines()
    assert first == "ZeroDivisionError: a cog is loose"
    assert re.fullmatch(r"  --> std/moe\.arch:\d+, in layers\[1\]\.mlp", place)


def test_a_token_beyond_the_table_is_told_before_or_where_it_is_looked_up():
    model = fresh()
    with pytest.raises(dslc.UserError, match=r"^'token' 51 is not one of 0 \.\. 50$"):
        model(torch.tensor([[51]]))
    with pytest.raises(RunError) as caught:  # who batches for himself is not held up by checks
        model.step("main", Step([1]), {"token": torch.tensor([SIZES["vocab"]])})
    assert caught.value.block == "" and caught.value.place.startswith("models/dsv3.arch:")
    assert str(caught.value).startswith("IndexError: index out of range in self\n  --> models/")


def test_neither_the_source_nor_the_emitted_file_need_be_there_any_more(tmp_path):
    (tmp_path / "toy.arch").write_text(MODEL)
    dslc.compile(tmp_path / "toy.arch").save(tmp_path / "out")
    model = dslc.load(tmp_path / "out")
    (tmp_path / "toy.arch").unlink()
    (tmp_path / "out" / "model.py").unlink()
    model.module.layers[2].W = wrong(5)
    error = error_of(model)
    assert error.place.endswith("toy.arch:10") and error.block == "layers[2]"
    assert error.equation == "long[t,d] = W[d] * x[t,d] + W[d] * tanh(x[t,d])"


def test_a_step_that_failed_leaves_the_cache_as_it_was():
    model = fresh()
    cache = model.new_cache(1)
    model(TOKENS, cache=cache)
    kept, model.module.layers[2].attn.W_o = model.module.layers[2].attn.W_o, wrong(3, 3)
    with pytest.raises(RunError):
        model(TOKENS, cache=cache)
    assert cache.lengths == [4]
    model.module.layers[2].attn.W_o = kept
    again = model(TOKENS, cache=cache)
    whole = model(torch.cat([TOKENS, TOKENS], 1))
    assert torch.allclose(again, whole[:, 4:], atol=1e-5)


def test_the_command_prints_it_as_one_message(capsys, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(torch.nn.functional, "silu", broken)
    status = cli.run(["run", str(compiled()), "--tokens", "1,2"])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("error: MemoryError: no room\n  --> std/ffn.arch:16, in layers[0].mlp\n")
    assert "Traceback" not in err
    with pytest.raises(RunError):
        cli.run(["run", str(compiled()), "--tokens", "1,2", "--debug"])


def test_a_place_may_stand_on_a_line_of_its_own_and_a_statement_on_several():
    lines = (
        "def main(self, x, W):",
        "    # let score[h,t,s]: f32 = (q[t,h,n] * k[s,h,n] + q_r[t,h,j] * k_r[s,j])",
        "    #   * softmax_scale",
        "    #   std/mla.arch:59",
        "    y = x + 1",
        "    return torch.linalg.multi_dot(",
        "        [x, W]",
        "    )",
    )
    module = ModuleType("emitted")
    module.torch = torch
    remember_text(module, "\n".join(lines))
    exec("\n".join(lines), module.__dict__)
    with pytest.raises(RuntimeError) as caught:
        module.main(None, torch.ones(2, 3), torch.ones(4, 5))
    error = located(caught.value)
    assert error is not None and error.place == "std/mla.arch:59" and error.block == ""
    assert error.equation == (
        "let score[h,t,s]: f32 = (q[t,h,n] * k[s,h,n] + q_r[t,h,j] * k_r[s,j]) * softmax_scale"
    )
    assert str(error).endswith("  with x float32 [2, 3], W float32 [4, 5]")
    assert located(ValueError("elsewhere")) is None


def test_paths_are_those_of_the_source():
    assert source_path("layers.3.mlp.expert.17") == "layers[3].mlp.expert[17]"
    assert source_path("turn.0.near") == "turn[0].near" and source_path("") == ""
