"""The shard pass: what each op becomes on one rank, as text, and as a translation."""

import json
import re
import time

import pytest

from compiler.equivalence import equivalent
from compiler.passes.placing import NotBuilt
from compiler.pipeline import compile_model
from compiler.text import body_text, parse, program_text, same
from dsl.constants import Choices
from dsl.diagnostics import DiagnosticError
from dslc import cli

MODEL = """
edition 2026
index t : time
const hidden = 12
const wide = 20
const vocab = 24
const blocks = 8

block Unit[d] {{
  index f : wide
  param up[f, d]
  param down[d, f]
  def (x[d]) -> y[d] {{
    y[d] = down[d,f] * (up[f,d] * x[d])
  }}
}}

block Mix[d] {{
  index g : 4, m : blocks / 4, e = (g, m), k : 3
  param centroid[e, d]
  use unit[e] = Unit[d]
  use shared = Unit[d]
  def (x[d]) -> y[d] {{
    score[e]: f32 = softmax[e](centroid[e,d] * x[d])
    pick[k]       = argtop[e -> k](score[e])
    gate[k]: f32  = score[pick[k]]
    y[d]          = shared(x[d]) + gate[k] * unit[pick[k]](x[d])
  }}
}}

model Small {{
  index d : hidden, w : vocab
  param embed[w, d]
  param head[w, d]
  use mix = Mix[d]
  def main(token[t] of w) -> logits[t,w] {{
    h[t,d] = embed[token[t], d] + mix(embed[token[t], d])
    logits[t,w] = head[w,d] * h[t,d]
  }}
}}

deploy here of Small {{ {deploy} }}
"""


def compiled(tmp_path, deploy):
    file = tmp_path / "small.arch"
    file.write_text(MODEL.format(deploy=deploy))
    return compile_model(str(file), Choices(), deploy="here")


def sharded(tmp_path, deploy, body):
    """The lines of a body, without source places."""
    return body_lines(compiled(tmp_path, deploy).after("shard").bodies[body])


def body_lines(graph):
    lines = [re.sub(r"  // .*", "", line).strip() for line in body_text(graph).splitlines()]
    return [line for line in lines if line.startswith("%")]


def communication(lines):
    ops = "all_reduce|reduce_scatter|all_gather|part_of|gather_part|routing|dispatch|combine"
    return [line for line in lines if re.search(rf"= ({ops})\(", line)]


def test_a_divided_sum_is_reduced_where_someone_needs_it(tmp_path):
    """Two partial sums that are added are reduced together, once; rows of a divided table too."""
    deploy = "mesh tp = 2  shard wide -> tp, vocab -> tp"
    assert communication(sharded(tmp_path, deploy, "Mix.call")) == []
    assert communication(sharded(tmp_path, deploy, "Small.main")) == [
        '%1 = gather_part(%embed, %wanted) axes=("tp") dim="w/tp" : act[row, d]',
        '%2 = gather_part(%embed, %token) axes=("tp") dim="w/tp" : act[t, d]',
        '%2.allreduce = all_reduce(%2) axes=("tp") fn="sum" : act[t, d]',
        '%h.allreduce = all_reduce(%h) axes=("tp") fn="sum" : act[row, d]',
        '%logits.allgather = all_gather(%logits) axes=("tp") dim="w/tp" : act[row, w]',
    ]


def test_an_axis_that_is_taken_apart_as_a_sum_is_whole(tmp_path):
    """A rank's rows of an index are others than its rows of each part."""
    text = """
edition 2026
index t : time
const wide = 20
block Parts[d] {
  index f : wide, a : 4, b : size(f) - 4
  param up[f, d]
  param down[d, f]
  def (x[d]) -> y[d] {
    u[f]         = up[f,d] * x[d]
    let v[a|b]   = u[a|b]
    let w[a|b]   = concat[a|b](2 * v[a], v[b] * v[b])
    y[d]         = down[d,f] * w[f]
  }
}
model Small {
  index d : 12, w : 24
  param embed[w, d]
  use parts = Parts[d]
  def main(token[t] of w) -> logits[t,w] { logits[t,w] = embed[w,d] * parts(embed[token[t], d]) }
}
deploy here of Small { mesh tp = 2  shard Parts.f -> tp }
"""
    file = tmp_path / "small.arch"
    file.write_text(text)
    program = compile_model(str(file), Choices(), deploy="here")
    lines = communication(body_lines(program.after("shard").bodies["Parts.call"]))
    assert [line.split("(")[0].split()[-1] for line in lines] == ["all_gather", "part_of"]


def test_an_array_of_blocks_that_is_dealt_out_is_sent_tokens(tmp_path):
    lines = sharded(tmp_path, "mesh ep = 4  shard batch -> ep, Mix.unit -> ep", "Mix.call")
    assert [line.split(" = ")[1].split("(")[0] for line in communication(lines)] == [
        "routing", "dispatch", "combine",
    ]  # fmt: skip
    assert any("softmax" in line and "f32[t, e]" in line for line in lines), "scores stay whole"
    (route,) = [line for line in lines if "routing(" in line]
    assert route.endswith(": i64[2.rows] of e/ep") or "of e/ep" in route


def test_ranks_that_have_the_same_tokens_send_none(tmp_path):
    lines = sharded(tmp_path, "mesh ep = 4  shard Mix.unit -> ep", "Mix.call")
    (route,) = [line for line in lines if "routing(" in line]
    assert 'axes=("ep") sent=()' in route


@pytest.mark.parametrize(
    "deploy",
    [
        "mesh tp = 2  shard wide -> tp, vocab -> tp",
        "mesh ep = 4  shard batch -> ep, Mix.unit -> ep",
        "mesh ep = 4  shard Mix.unit -> ep",
        "mesh ep = 2, tp = 2  shard batch -> ep, Mix.unit -> ep, wide -> tp, vocab -> tp",
        "mesh dp = 2, ep = 2  shard batch -> dp, Mix.unit -> (ep, dp), vocab -> ep",
        "mesh ep = 4  shard batch -> ep, Mix.unit -> ep with 4 redundant",
        "mesh tp = 2  shard hidden -> tp",
        "mesh tp = 2  shard Mix.e -> tp",
        "mesh tp = 2  shard Mix.g -> tp",
        "mesh a = 2, b = 2  shard vocab -> (a, b), wide -> (b, a)",
    ],
)
def test_every_rank_computes_what_one_would(tmp_path, deploy):
    stages = compiled(tmp_path, deploy)
    equivalent(stages.after("recognise"), stages.after("shard"))
    text = program_text(stages.after("shard"))
    assert same(parse(text), stages.after("shard")) and text == program_text(parse(text))


def test_what_cannot_be_divided_is_refused_at_its_line(tmp_path):
    with pytest.raises(Exception, match="'e' cannot be divided along 'm'") as raised:
        compiled(tmp_path, "mesh tp = 2  shard Mix.m -> tp")
    assert "divide 'g' or 'e' instead" in str(raised.value)


def test_the_program_does_not_grow_with_the_ranks(tmp_path):
    file = tmp_path / "large.arch"
    for ranks in (2, 128):
        deploy = f"mesh dp = 16, ep = {ranks}  shard batch -> (dp, ep), MoE.expert -> ep"
        file.write_text(f"import dsv3\ndeploy here of DeepSeekV3 {{ {deploy} }}\n")
        begun = time.process_time()
        text = program_text(compile_model(str(file), deploy="here").after("shard"))
        taken = time.process_time() - begun
        if ranks == 2:
            first, before = text, taken
    assert len(text.splitlines()) == len(first.splitlines())
    assert taken < 2 * before + 1


NAMED = """
edition 2026
import std.norm
index t : time
const hidden = 12
const vocab = 24

block Heads[d] {{
  index g : 4, m : 2, n : 3, a = (g, m, n), b = (g, n)
  param W_q[a, d]
  param W_k[b, d]
  param W_o[d, a]
  use q_norm = RMSNorm[a]
  use k_norm = RMSNorm[b]
  def (x[t,d]) -> y[t,d] {{
    q[t,a]     = q_norm(W_q[a,d] * x[t,d])
    k[t,b]     = k_norm(W_k[b,d] * x[t,d])
    o[t,g,m,n] = q[t,(g,m,n)] * k[t,(g,n)]
    r[t,(g,m,n)] = o[t,g,m,n]
    y[t,d]     = W_o[d,a] * r[t,a]
  }}
}}

model Small {{
  index d : hidden, w : vocab, l : 2
  param embed[w, d]
  use layers[l] = Heads[d]
  def main(token[t] of w) -> logits[t,w] {{
    x[t,d] = chain[l](layers, embed[token[t], d])
    logits[t,w] = embed[w,d] * x[t,d]
  }}
}}

const norm_eps = 1e-6
deploy here of Small {{ {deploy} }}
"""


def test_a_product_with_a_name_is_divided_with_its_outermost_index(tmp_path):
    """A norm over all heads together: a partial sum of squares, and a rank's part of the gain."""
    file = tmp_path / "named.arch"
    file.write_text(NAMED.format(deploy="mesh tp = 2  shard Heads.g -> tp"))
    found = compile_model(str(file), Choices(), deploy="here", check=True)
    program = found.after("shard")
    assert program.modules["Heads"].parameters[0].type.dims[0].name == "a/tp"
    gains = [
        p.type.dims[0].name for m in ("RMSNorm", "RMSNorm.1") for p in program.modules[m].parameters
    ]
    assert gains == ["d/tp", "d/tp"]


def test_a_sum_with_a_name_cannot_be_divided_along_its_parts(tmp_path):
    file = tmp_path / "next.arch"
    clauses = "mesh tp = 2  shard GatedDelta.g -> tp"
    file.write_text(f"import qwen3_next\ndeploy here of Qwen3Next {{ {clauses} }}\n")
    with pytest.raises(DiagnosticError) as raised:
        compile_model(str(file), Choices(preset="small"), deploy="here")
    said = str(raised.value)
    assert "'a' cannot be divided along 'qs', which is not its outermost index" in said
    assert f"{file}:2:" in said


def test_blocks_that_run_in_turn_are_placed_by_stages(tmp_path):
    file = tmp_path / "named.arch"
    text = NAMED.format(deploy="mesh tp = 2  shard Small.l -> tp")
    file.write_text(text)
    line = 1 + text[: text.index("deploy here")].count("\n")
    with pytest.raises(NotBuilt) as raised:
        compile_model(str(file), Choices(), deploy="here")
    assert str(raised.value) == (
        f"{file}:{line}: the blocks of 'layers' run one after the other: stages place them, no "
        "shard rule"
    )


@pytest.mark.parametrize("deploy", ["mesh ep = 2  shard batch -> ep, Mix.unit -> ep"])
def test_what_experts_give_is_rounded_behind_the_sum(tmp_path, deploy):
    """`y` is of the model's type, and gates are f32: the sum is too."""
    text = MODEL.replace("y[d]          = shared(x[d]) + gate[k]", "y[d]          = gate[k]")
    file = tmp_path / "small.arch"
    file.write_text(text.format(deploy=deploy))
    graph = compile_model(str(file), Choices(), deploy="here", check=True)
    graph = graph.after("shard")
    (combined,) = (n for n in graph.bodies["Mix.call"] if n.op == "combine")
    assert (
        combined.type.dtype == "f32"
        and graph.bodies["Mix.call"].users(combined.name)[0].op == "cast"
    )


def test_plans_count_a_rank_s_part_of_it(tmp_path, capsys):
    text = NAMED.replace("import std.norm", "import std.norm\nimport clusters")
    text = text.replace("deploy here of Small", "deploy here of Small on h100")
    deploy = "mesh tp = 2  shard Heads.g -> tp  serve decode context = 8, batch_per_rank = 1"
    (tmp_path / "named.arch").write_text(text.format(deploy=deploy))
    assert cli.run(["plan", str(tmp_path / "named.arch"), "--deploy", "here", "--json"]) == 0
    weights = json.loads(capsys.readouterr().out)["memory_per_gpu_bytes"]["weights"]
    embedding, gains, products = 24 * 12, 24 + 12, (24 + 12 + 24) * 12
    assert weights == 2 * (embedding + 2 * (gains + products // 2))
