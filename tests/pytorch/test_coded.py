"""Quantised products as emitted: held to the interpreter, and the runtime to the definition."""

import pytest
import torch
from torch import nn

from backends.pytorch.emit.module import emit
from backends.pytorch.names import attribute_path
from backends.pytorch.runtime import Step, quantize, scaled_linear, wide
from backends.pytorch.runtime.fp8 import CodedWeight, code_type, quantised_matrix
from backends.pytorch.weights.allocate import coded_shapes
from compiler import numerics
from compiler.coding import Coding
from compiler.interpret import Interpreter, parameters, random_weights
from compiler.pipeline import compile_model
from dsl.constants import Choices
from dsl.program import open_program
from tests.compiler.mixed import ARCH, RECIPE
from tests.pytorch.running import made

FORMATS = open_program("dsv3").formats
E4M3 = Coding(FORMATS["e4m3"], 1, 128)

HEADS = """
edition 2026
import std.norm
import std.formats
import std.rotary
const vocab = 30
const hidden = 14
index t : time, s : history t
block Mixer[d] {
  index h : 2, n : 6
  param Q[(h,n), d]  param K[h, n, d]  param V[(h,n), d]  param O[d, h, n]
  def (x[t,d]) -> y[t,d] {
    q[t,h,n] = rotary[n](Q[(h,n),d] * x[t,d], position[t])
    cached k[s,h,n] = rotary[n](K[h,n,d] * x[t,d], position[t])
    cached v[s,h,n] = V[(h,n),d] * x[t,d]
    let score[h,t,s]: f32 = q[t,h,n] * k[s,h,n] * 0.3
    let p[h,t,s]: f32 = softmax[s](where(position[s] <= position[t], score[h,t,s], -inf))
    o[t,h,n] = p[h,t,s] * v[s,h,n]
    y[t,d] = O[d,h,n] * o[t,h,n]
  }
}
model Small {
  index d : hidden, w : vocab
  param embed[w, d]
  use norm = RMSNorm[d]
  use mixer = Mixer[d]
  def main(token[t] of w) -> logits[t,w] {
    x[t,d] = embed[token[t], d]
    logits[t,w] = embed[w,d] * (x[t,d] + mixer(norm(x[t,d])))
  }
}
"""
SMALL_TILES = "activations = 1 x 4, weights = 3 x 4"


def coded(program, weights):
    """The emitted model, its weights kept as the program says."""
    model = made(program, weights)
    for path, parameter in parameters(program):
        if parameter.coding is None:
            continue
        owner, _, name = attribute_path(path).rpartition(".")
        codes, scales = coded_shapes(weights[path].shape, parameter.coding)
        made_of = torch.empty(codes, dtype=code_type(parameter.coding.format))
        kept = CodedWeight(made_of, torch.empty(scales), parameter.coding, torch.float32)
        kept.fill(weights[path])
        setattr(model.get_submodule(owner), name, nn.Parameter(kept, requires_grad=False))
    return model


@pytest.mark.parametrize(
    ("source", "clause"),
    [
        (ARCH, f"it({RECIPE})"),
        (ARCH, f"it(e4m3, {SMALL_TILES}, promote = 4)"),
        (ARCH, f"ue(e4m3_ue8m0, {SMALL_TILES})"),
        (ARCH, f"it(e5m2, {SMALL_TILES}) for mixed"),
        (ARCH, "rows(int8, activations = 1 x all, weights = 1 x all)"),
        (ARCH, "w4(weights = int4 1 x 4) for mlp"),
        (HEADS, f"it(e4m3, {SMALL_TILES})"),
        (HEADS, f"all(e4m3, {SMALL_TILES}) for contractions"),
    ],
)
def test_emitted_is_interpreted(tmp_path, source, clause):
    """Nearer to the interpreter by far than to a model that is not quantised."""
    file = tmp_path / "small.arch"
    file.write_text(f"{source}\ndeploy cast of Small {{ precision {clause} }}\n")
    compiled = compile_model(str(file), deploy="cast")
    program = compiled.program
    weights = random_weights(program, seed=1)
    model = coded(program, weights)
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    with torch.no_grad():
        step = Step([8])
        found = model.main(step, tokens)
    reference = Interpreter(compiled.after("select-fp8"), weights).run("main", {"token": tokens})
    exact = Interpreter(compiled.after("elaborate"), weights).run("main", {"token": tokens})
    lost = (reference - exact).norm()
    assert lost > 1e-3 * exact.norm()
    assert (found - reference).norm() <= 0.1 * lost


def test_the_model_reads_as_if_written_by_hand():
    text = emit(compile_model("dsv3", Choices(preset="small"), deploy="fp8").program)
    for line in (
        "E4M3_1X128 = Coding(E4M3, 1, 128)",
        "    def coded(self, x: Tensor) -> Coded:",
        "        return quantize(y, E4M3_1X128)",
        "        cq = self.q_norm.coded(scaled_linear(x, self.W_dq, promote=128))",
        "        h = x + self.attn(step, self.attn_norm.coded(x), cos, sin)",
        "        x_codes = quantize(x, E4M3_1X128)",
        "        routed = experts(self.expert, pick, gate, x_codes[:, None])",
        "        return scaled_linear(quantize(a, E4M3_1X128), self.W_down, promote=128)",
    ):
        assert line in text.splitlines(), line


# -- the runtime -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e4m3_ue8m0", "int8", "int4", "mxfp8", "mxfp4"])
@pytest.mark.parametrize("shape", [(3, 200), (1, 128), (5, 7), (0, 64)])
def test_codes_are_those_of_the_definition_bit_by_bit(name, shape):
    coding = Coding(FORMATS[name], 1, 32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5
    found = quantize(x, coding)
    codes, scales = numerics.quantised(x, coding)
    assert torch.equal(found.codes.float(), codes)
    assert torch.equal(found.scales.repeat_interleave(32, -1)[:, : shape[1]], scales)


@pytest.mark.parametrize("tile", [(4, 3), (128, 128), (None, 5), (2, None)])
def test_weights_are_quantised_a_band_at_a_time(monkeypatch, tile):
    coding = Coding(FORMATS["e4m3"], *tile)
    weight = torch.randn(13, 11, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("backends.pytorch.runtime.fp8.BAND", 20)
    codes, scales = coded_shapes(weight.shape, coding)
    kept = CodedWeight(
        torch.empty(codes, dtype=torch.float8_e4m3fn), torch.empty(scales), coding, torch.float32
    )
    kept.fill(weight)
    assert torch.equal(kept.wide(), numerics.represented(weight, coding).float())
    whole = quantised_matrix(weight, coding)
    assert torch.equal(kept.codes.view(torch.uint8), whole[0].view(torch.uint8))
    assert torch.equal(kept.scale, whole[1])


def test_a_format_is_kept_in_the_shortest_type_that_has_its_values():
    kept = {name: code_type(FORMATS[name]) for name in ("e4m3", "e5m2", "e2m1", "int8", "bf16")}
    assert kept == {
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e2m1": torch.float8_e4m3fn,
        "int8": torch.int8,
        "bf16": torch.bfloat16,
    }


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_own_row_only(bad):
    coding = Coding(FORMATS["e4m3"], 4, 4)
    weight = CodedWeight(
        torch.empty(5, 9, dtype=torch.float8_e4m3fn), torch.empty(2, 3), coding, torch.float32
    )
    weight.fill(torch.randn(5, 9))
    x = torch.randn(3, 9)
    x[1, 2] = bad
    found = scaled_linear(quantize(x, Coding(coding.format, 1, 4)), weight)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_rows_of_codes_are_chosen_and_repeated_as_values_are():
    x = torch.randn(4, 1, 130)
    found = quantize(x, E4M3)
    rows = torch.tensor([2, 0, 2])
    chosen = found.flatten(0, 1).index_select(0, rows)
    assert torch.equal(chosen.wide(), found.wide().flatten(0, 1)[rows])
    assert torch.equal(found[1:2].expand(3, 1, 130).wide(), found.wide()[1:2].expand(3, 1, 130))
    assert torch.equal(found[:, None].wide(), found.wide()[:, None])


def test_a_model_that_is_moved_keeps_its_codes(tmp_path):
    import dslc

    dslc.compile("dsv3", dims="small", deploy="fp8").save(tmp_path / "m")
    model = dslc.load(tmp_path / "m", seed=0)
    before = model.weight("layers[0].mlp.W_up").codes.clone()
    model = model.to(torch.bfloat16)
    after = model.weight("layers[0].mlp.W_up")
    assert after.dtype == torch.bfloat16 and torch.equal(
        after.codes.view(torch.uint8), before.view(torch.uint8)
    )
    logits = model(torch.tensor([[1, 2, 3]]))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    traced = model.trace(["layers[1].attn.cq", "layers[1].attn.c_kv"], torch.tensor([[1, 2, 3]]))
    assert traced["layers[1].attn.cq"].shape == (1, 3, 96)


def test_wide_is_not_rounded_twice():
    coding = Coding(FORMATS["e4m3"], 2, 2)
    weight = CodedWeight(
        torch.empty(2, 4, dtype=torch.float8_e4m3fn), torch.empty(1, 2), coding, torch.bfloat16
    )
    weight.fill(torch.randn(2, 4))
    exact = weight.codes.float() * weight.scale.repeat_interleave(2, 1)
    assert torch.equal(wide(weight), exact) and wide(weight).dtype == torch.float32
    assert torch.equal(weight.wide(), exact.bfloat16())
