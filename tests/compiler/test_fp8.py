"""select-fp8 and fp8: what is chosen, what hands codes to what, and that both keep the meaning."""

import re
from functools import cache

import pytest

from compiler.casts import casts
from compiler.equivalence import NotEquivalent, equivalent
from compiler.errors import UserError
from compiler.passes import fp8, order, select_fp8
from compiler.pipeline import compile_model
from compiler.spec import bytes as moved
from compiler.spec import flops
from compiler.text import body_text, parse, program_text, same
from compiler.verify import verify
from dsl.constants import Choices

MLP = {"W_gate", "W_up", "W_down"}
RECIPE = "e4m3, activations = 1 x 128, weights = 128 x 128, promote = 128"

ARCH = """
edition 2026
import std.norm
import std.ffn
import std.formats

const vocab = 40
const hidden = 12
index t : time

block Mixed[d] {
  index h : 2, n : 3, a : 7, b : 5
  param W[(h, n), d]
  param U[a|b, d]
  param V[d, (h, n)]
  param P[d, a|b]
  def (x[t,d]) -> y[t,d] {
    q[t,h,n] = W[(h,n),d] * x[t,d]
    r[t,h,n] = W[(h,n),d] * x[t,d] * 0.5
    u[t,a|b] = U[a|b,d] * x[t,d]
    o[t,d]   = V[d,(h,n)] * q[t,h,n]
    p[t,d]   = P[d,a] * u[t,a] + P[d,b] * u[t,b]
    y[t,d]   = o[t,d] + p[t,d] + V[d,(h,n)] * r[t,h,n]
  }
}

model Small {
  index d : hidden, w : vocab
  param embed[w, d]
  use norm = RMSNorm[d]
  use mixed = Mixed[d]
  index f : 10
  use mlp = SwiGLU[d, f]
  def main(token[t] of w) -> logits[t,w] {
    x0[t,d] = embed[token[t], d]
    x1[t,d] = x0[t,d] + mixed(norm(x0[t,d]))
    x2[t,d] = x1[t,d] + mlp(x1[t,d])
    logits[t,w] = embed[w,d] * x2[t,d]
  }
}
"""


@pytest.fixture
def small(tmp_path):
    """The small model with a precision clause, compiled for it."""

    def compiled(clause, check=False, extra=""):
        file = tmp_path / "small.arch"
        file.write_text(f"{ARCH}\ndeploy cast of Small {{\n  precision {clause}\n{extra}}}\n")
        return compile_model(str(file), deploy="cast", check=check)

    return compiled


@cache
def dsv3(deploy="fp8"):
    return compile_model("dsv3", Choices(preset="small"), deploy=deploy)


def shown(program, body):
    """A body's lines without dims and places."""
    lines = body_text(program.bodies[body]).splitlines()
    return [line.split("  //")[0].strip() for line in lines if line.startswith("  %")]


# -- choosing --------------------------------------------------------------------------------------


def test_the_published_recipe_chooses_the_linear_layers():
    rows = {(r.path, r.parameter, r.value): r for r in casts(dsv3().after("elaborate"))}
    cast = {parameter for (_, parameter, _), row in rows.items() if row.cast}
    assert cast == {"W_dq", "W_uq", "W_dkv", "W_o", "W_gate", "W_up", "W_down"}
    left = {row.parameter: row.reason for row in rows.values() if not row.cast and row.parameter}
    assert left == {
        "head": "the rule excepts it",
        "W_eh": "the rule excepts it",
        "centroid": "the rule excepts it",
        "W_ukv": "is multiplied in another order where that costs less",
    }
    scores = [row for row in rows.values() if row.parameter is None]
    assert {row.reason for row in scores} == {"no factor is a parameter"}
    experts = rows["layers[1..4].mlp.expert[0..16]", "W_down", "y"]
    assert experts.count == (3 + 1) * 16  # the layers', and the MTP module's
    assert (experts.activations, experts.weights) == ("e4m3 1 x 128", "e4m3 128 x 128")


def test_a_deployment_that_trains_takes_nothing_apart():
    rows = casts(compile_model("dsv3", deploy="pretrain").after("elaborate"))
    assert all(row.cast for row in rows if row.parameter == "W_ukv")


def test_absorbed_weights_are_stored_quantised_and_read_as_they_stand_for():
    program = dsv3().after("fp8")
    for side in ("few", "many"):
        lines = shown(program, f"MLA.call.{side}")
        assert any(line.startswith("%W_ukv_wide = dequantize(%W_ukv)") for line in lines)
        assert not any("scaled_contract" in line for line in lines)


def test_marks_keep_chains_apart_and_products_out_of_attention(small):
    """Every contraction, the core of attention included, if a rule says so."""
    program = dsv3().after("select-fp8")
    before = [n.name for n in program.bodies["MLA.call"] if n.op == "scaled_contract"]
    after = [n.name for n in order.run(program).bodies["MLA.call"] if n.op == "scaled_contract"]
    assert before == after


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (
            "contractions with a parameter",
            {"W", "U", "V", "P", "embed", "W_gate", "W_up", "W_down"},
        ),
        ("contractions with a parameter, except embed, mlp", {"W", "U", "V", "P"}),
        ("Mixed.W, mlp", {"W"} | MLP),
        ("Mixed.q, SwiGLU.a", {"W"}),  # the contractions that define these values
        ("mixed, except Mixed.U", {"W", "V", "P"}),
    ],
)
def test_rules_speak_of_parameters_uses_blocks_and_values(small, selection, chosen):
    rows = casts(small(f"it({RECIPE}) for {selection}").after("elaborate"))
    assert {row.parameter for row in rows if row.cast} == chosen


def test_the_last_rule_decides(small):
    rules = (
        f"first({RECIPE})\n  precision second(e5m2, activations = 1 x 4, weights = 8 x 4) for mlp"
    )
    rows = casts(small(rules).after("elaborate"))
    found = {row.parameter: row.weights for row in rows}
    assert found["W_down"] == "e5m2 8 x 4" and found["W"] == "e4m3 128 x 128"


def test_two_formats_for_one_parameter_are_refused(small):
    rules = "a(e4m3, activations = 1 x 4, weights = 4 x 4) for Mixed.q\n"
    rules += "  precision b(e5m2, activations = 1 x 4, weights = 4 x 4) for Mixed.r"
    with pytest.raises(UserError) as raised:
        small(rules)
    assert re.fullmatch(
        r"'W' is wanted in e4m3 4 x 4 \(.*small.arch:18\) and in e5m2 4 x 4 \(.*small.arch:19\): "
        "a parameter is kept once",
        str(raised.value),
    )


def test_tiles_over_several_tokens_are_refused(small):
    with pytest.raises(UserError) as raised:
        small("it(e4m3, activations = 2 x 8, weights = 8 x 8)")
    assert "a tile of 2 x 8 would give tokens a scale in common" in str(raised.value)
    assert "small.arch:" in str(raised.value) and "activations = 1 x N" in str(raised.value)


# -- placing ---------------------------------------------------------------------------------------


def test_a_body_of_projections_takes_and_makes_codes():
    assert shown(dsv3().after("fp8"), "SwiGLU.call") == [
        '%x = input name="x" : coded[t, d] {e4m3 1 x 128 of d}',
        '%W_gate = param param="W_gate" : coded[f, d] {e4m3 128 x 128 of d}',
        '%gate = scaled_contract(%x, %W_gate) over=("d") promote=128 : act[t, f] as gate rounds',
        '%W_up = param param="W_up" : coded[f, d] {e4m3 128 x 128 of d}',
        '%up = scaled_contract(%x, %W_up) over=("d") promote=128 : act[t, f] as up rounds',
        '%y.1 = map(%gate) fn="silu" : act[t, f] rounds',
        '%a = map(%y.1, %up) fn="mul" : act[t, f] as a rounds',
        '%W_down = param param="W_down" : coded[d, f] {e4m3 128 x 128 of f}',
        "%a_codes = quantize(%a) coding={e4m3 1 x 128 of f} : coded[t, f] {e4m3 1 x 128 of f}",
        '%y = scaled_contract(%a_codes, %W_down) over=("f") promote=128 : act[t, d] as y rounds',
    ]


def test_norms_hand_codes_over_and_so_does_dispatch():
    program = dsv3().after("fp8")
    assert shown(program, "RMSNorm.call.coded")[-1].startswith("%y_codes = quantize(%y)")
    dense = "\n".join(shown(program, "Dense.call"))
    assert 'call(%x) body="RMSNorm.call.coded" child="attn_norm"' in dense
    assert "quantize" not in dense
    sparse = [line for line in shown(program, "MoE.call") if "%x_codes" in line]
    assert len(sparse) == 3  # made once; for the routed experts and the shared one
    assert sparse[0].startswith("%x_codes = quantize(%x)")
    assert "experts(%pick, %gate, %x_codes)" in sparse[1]
    assert shown(program, "MoE.call.experts")[2].startswith('%x = input name="x" : coded[t, d]')


def test_views_of_rows_stand_behind_the_product_and_views_of_columns_before_it(small):
    lines = shown(small(f"it({RECIPE})").after("fp8"), "Mixed.call")
    assert '%q_flat = scaled_contract(%x, %W) over=("d") promote=128 : act[t, (h,n)]' in lines
    assert any(line.startswith("%q = unflatten(%q_flat)") for line in lines)
    flat = next(line.split()[0] for line in lines if "= flatten(%q) " in line)
    assert any(f"= quantize({flat})" in line for line in lines)
    # A part of a matrix: as its codes stand for it, each element with the whole matrix's scale.
    assert "%P_exact = dequantize(%P) : f32[d, a|b]" in lines
    assert any("quantize(" in line and "of a}" in line for line in lines)


def test_weights_alone(small):
    compiled = small("w8(weights = e4m3 4 x 4) for mlp", check=True)
    lines = shown(compiled.after("fp8"), "SwiGLU.call")
    assert "%W_up_wide = dequantize(%W_up) : act[f, d]" in lines
    assert not any("scaled_contract" in line for line in lines)
    reasons = {r.parameter: r.reason for r in casts(compiled.after("elaborate"))}
    assert "the rule leaves activations" in reasons["W_up"]


def test_text_reads_back():
    for stage in ("select-fp8", "fp8", "lifetimes"):
        program = dsv3().after(stage)
        again = parse(program_text(program))
        assert same(again, program)
        verify(again)


def test_costs():
    graph = dsv3().after("fp8").bodies["SwiGLU.call"]
    at = {**dsv3().program.sizes, "time": 3}
    t, d, f = 3, 256, 704
    assert flops(graph["gate"], graph).at(at) == 2 * t * d * f
    codes = t * f + t * f * 4 / 128  # one float32 for 128 of a row
    assert moved(graph["a_codes"], graph).at(at) == pytest.approx(t * f * 2 + codes)
    weight, x = f * d * (1 + 4 / 128**2), t * d * (1 + 4 / 128)
    assert moved(graph["gate"], graph).at(at) == pytest.approx(weight + x + t * f * 2, abs=1)


# -- meaning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clause",
    [
        f"it({RECIPE})",
        "ue(e4m3_ue8m0, activations = 1 x 4, weights = 3 x 4)",
        "every(e4m3, activations = 1 x 4, weights = 4 x 4) for contractions",
        "it(int8, activations = 1 x all, weights = 1 x all)",
        "plain(bf16)  for mlp",
    ],
)
def test_passes_are_translations(small, clause):
    small(clause, check=True)


def test_the_whole_model_is_verified():
    compile_model("dsv3", Choices(preset="small"), deploy="fp8", check=True)


def test_verification_sees_a_value_that_is_quantised_wrongly():
    marked = dsv3().after("recognise")
    wrong = fp8.run(marked)
    text = program_text(wrong).replace(
        "quantize(%a) coding={e4m3 1 x 128 of f} : coded[t, f] {e4m3 1 x 128 of f}",
        "quantize(%a) coding={e4m3 1 x 1 of f} : coded[t, f] {e4m3 1 x 1 of f}",
    )
    broken = parse(text)
    assert not same(broken, wrong)
    with pytest.raises(NotEquivalent):
        equivalent(marked, broken)


def test_nothing_is_chosen_without_a_rule():
    program = compile_model("dsv3", Choices(preset="small")).after("elaborate")
    assert select_fp8.run(program) is program and casts(program) == []


@pytest.mark.parametrize(
    ("shard", "ffn", "said"),
    [
        ("Dense.f -> tp", 512, None),
        (
            "Dense.f -> tp",
            704,
            "2 ranks (FILE:4) share the 704 elements along 'f' that the product with 'W_down' "
            "sums, 352 each, and precision 'fp8' has tiles of 1 x 128: a part would not start on a "
            "tile",
        ),
        (
            "MLA.h -> tp",
            512,
            "2 ranks (FILE:4) share the 128 elements along 'h' that the product with 'W_o' sums, "
            "64 each, and precision 'fp8' has tiles of 1 x 128: a part would not start on a tile",
        ),
        ("vocab -> tp", 704, None),  # nothing sums over it
    ],
)
def test_parts_of_a_sum_start_on_a_tile(tmp_path, shard, ffn, said):
    file = tmp_path / "tp.arch"
    deploy = f"deploy tp of DeepSeekV3 from fp8 {{ mesh tp = 2\n  shard {shard} }}"
    file.write_text(f"edition 2026\nimport dsv3\n{deploy}\n")
    choices = Choices(preset="small", set={"ffn": ffn})
    if said is None:
        compile_model(str(file), choices, deploy="tp")
        return
    with pytest.raises(UserError) as raised:
        compile_model(str(file), choices, deploy="tp")
    text = str(raised.value).replace(str(file), "FILE")
    assert re.sub(r"^\S+: ", "", text) == said


def test_decoding_is_not_compiled_ahead_for_it(tmp_path):
    import dslc

    program = dslc.compile("dsv3", dims="small", deploy="fp8")
    with pytest.raises(UserError, match="leave out --optimize or --deploy fp8"):
        program.save(tmp_path / "out", optimize="float32")
    assert not (tmp_path / "out").exists()
