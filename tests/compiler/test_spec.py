"""The spec table: every op has a rule and a meaning, and costs are polynomials."""

import subprocess
import sys

import pytest
from decoder import decoder

from compiler import spec
from compiler.ir import Program
from compiler.rules import agrees
from compiler.text import parse


def one_body(nodes: str, dims: str = "") -> Program:
    """A program whose one entry is this body."""
    return parse(
        f"""\
program p of M
const a = 6
const b = 4
module M of M {{
}}
entry main = M.main(x)
body M.main {{
  dim t [time] = time
  dim a = a
  dim b = b
{dims}
{nodes}
}}
"""
    )


def node(program: Program, body: str, name: str) -> tuple[spec.Node, spec.Graph]:
    graph = program.bodies[body]
    return graph[name], graph


def test_every_op_has_a_meaning() -> None:
    from compiler.meanings import meaning

    for op in spec.TABLE.values():
        assert callable(meaning(op.semantics)), op.name


def test_the_table_does_not_need_torch() -> None:
    script = "import compiler.verify, compiler.shrink, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_stored_types_are_those_of_the_rules() -> None:
    program = decoder()
    for scope, graph in spec.scopes(program):
        for item in graph:
            assert agrees(item.type, spec.inferred(item, graph, scope)), item


def test_a_body_is_judged_once_per_module_it_runs_in() -> None:
    places = [(scope.module, graph.name) for scope, graph in spec.scopes(decoder())]
    assert len(places) == len(set(places))
    assert ("Attention", "Attention.call") in places
    assert ("Ffn", "Ffn.call") in places


# dtypes of map: operand names stand for dtypes, c for a float constant, n for a whole one.
@pytest.mark.parametrize(
    ("fn", "operands", "result"),
    [
        ("add", "act act", "act"),
        ("add", "act f32", "f32"),
        ("mul", "act c", "act"),
        ("mul", "act n", "act"),
        ("mul", "i64 c", "f32"),
        ("mul", "i64 n", "i64"),
        ("mul", "i64 i64", "i64"),
        ("mul", "i64 act", "f32"),
        ("div", "i64 n", "f32"),
        ("mul", "f32 c", "f32"),
        ("exp", "act", "act"),
        ("cos", "i64", "f32"),
        ("floor", "i64", "i64"),
        ("le", "i64 i64", "bool"),
        ("and", "bool bool", "bool"),
        ("where", "bool f32 c", "f32"),
        ("where", "bool act c", "act"),
        ("where", "bool i64 n", "i64"),
    ],
)
def test_dtype_of_map(fn: str, operands: str, result: str) -> None:
    names = [f"%{o}" for o in operands.split()]
    program = one_body(
        f"""\
  %x = input name="x" : act[t]
  %act = map(%x) fn="neg" : act[t]
  %f32 = cast(%x) : f32[t]
  %i64 = position : i64[t]
  %bool = map(%x, %x) fn="lt" : bool[t]
  %c = constant value=0.5 : act[]
  %n = constant value=2 : i64[]
  %y = map({", ".join(names)}) fn="{fn}" : {result}[t]
  return %y"""
    )
    ((scope, graph),) = spec.scopes(program)
    assert spec.inferred(graph["y"], graph, scope).dtype == result


def test_flops_are_polynomials() -> None:
    program = decoder()
    q = spec.flops(*node(program, "Attention.call", "q"))
    assert str(q) == "4 * heads * hidden * time * width"  # 2 * (2 * width) * ...
    score = spec.flops(*node(program, "Attention.call", "s1"))
    assert str(score) == "2 * heads * history * time * width"
    assert spec.flops(*node(program, "Attention.call", "W_q")).constant == 0


def test_bytes_count_each_operand_once() -> None:
    program = decoder()
    read = spec.bytes(*node(program, "Ffn.call", "act"))
    assert str(read) == "4 * ffn * rows"  # in and out, two bytes each
    assert spec.bytes(*node(program, "Attention.call", "q_n")).constant == 0  # a view
    gather = spec.bytes(*node(program, "Model.main", "x0"))
    assert str(gather) == "4 * hidden * time + 8 * time"  # not the whole table
    wide = spec.bytes(*node(program, "Attention.call", "s1"), widths={**spec.WIDTHS, "f32": 8})
    assert "8 * heads * history * time" in str(wide)


def test_work_of_a_body_includes_what_it_runs() -> None:
    program = decoder()
    sizes = {**program.sizes, "time": 5, "history": 5, "wanted": 5}
    expert = spec.total_flops(program, "Ffn.call", {**sizes, "rows": 5 * sizes["per_token"]})
    sparse = spec.total_flops(program, "Sparse.call", sizes)
    more = spec.total_flops(program, "Sparse.call", {**sizes, "ffn": 2 * sizes["ffn"]})
    assert more - sparse == pytest.approx(expert, rel=1e-12)
    layers = spec.total_flops(program, "Model.main", {**sizes, "layers": sizes["layers"] + 1})
    assert layers - spec.total_flops(program, "Model.main", sizes) == sparse


def test_a_branch_costs_the_side_that_runs() -> None:
    program = one_body(
        """\
  %x = input name="x" : act[t]
  %y = branch(%x) when=("time", "<=", 3) then="few" otherwise="many" : act[t]
  return %y
}
body few {
  dim t [time] = time
  %x = input name="x" : act[t]
  %y = map(%x) fn="neg" : act[t]
  return %y
}
body many {
  dim t [time] = time
  %x = input name="x" : act[t]
  %1 = map(%x) fn="neg" : act[t]
  %y = map(%1) fn="neg" : act[t]
  return %y"""
    )
    work = [spec.total_flops(program, "M.main", {**program.sizes, "time": n}) for n in (3, 4)]
    assert work == [3, 8]


def test_an_op_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'contract' is registered twice"):
        spec.register(spec.TABLE["contract"])
