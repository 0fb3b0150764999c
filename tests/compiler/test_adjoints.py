"""Each op's adjoint alone: over random extents its gradients are autograd's, and some of them also
those of finite differences; which ops have none, and why."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler import spec
from compiler.adjoints import ADJOINTS, BODIES, ELEMENTWISE, ENDS, NONE, STEPS
from compiler.errors import UserError
from compiler.gradients import Gradients, gradients
from compiler.interpret import Interpreter
from compiler.ir import Program
from compiler.passes import differentiate
from compiler.rules import BINARY, FUNCTIONS
from compiler.text import parse
from compiler.verify import problems


def program(nodes: str, sizes: dict[str, int]) -> Program:
    """One body of the lines ``nodes``, with dims t (time), s (history), a, b, c, b|c and (a,b)."""
    constants = "\n".join(f"const {k} = {v}" for k, v in sizes.items())
    lines = list(nodes.strip().split("\n"))
    inputs = [line.split('name="')[1].split('"')[0] for line in lines if "= input" in line]
    return parse(
        f"""\
program p of M
{constants}
module M of M {{
}}
entry main = M.main({", ".join(inputs)})
body M.main {{
  dim t [time] = time
  dim s [history] = history
  dim r [rows] = wanted
  dim a = a
  dim b = b
  dim c = c
  dim k = k
  dim two = 2
  dim n = b
{nodes}
  return %y
}}
"""
    )


def run(body: str, sizes: dict[str, int], seed: int = 0, length: int = 3) -> tuple[Gradients, dict]:
    """The backward graph's gradients, and autograd's through the interpreter."""
    before = program(body, sizes)
    assert not problems(before)
    derived = differentiate.run(before)
    assert not problems(derived)
    random = torch.Generator().manual_seed(seed)
    inputs = {}
    lengths = {**sizes, "time": length, "history": length, "wanted": length}
    for node in before.bodies["M.main"].inputs:
        shape = [d.size.at(lengths) for d in node.type.dims]
        if node.type.dtype == "i64":
            value = torch.randint(node.type.of.size.at(sizes), shape, generator=random)
        else:
            # Away from 0, where some functions have no derivative; positive for log and powers.
            value = torch.rand(shape, generator=random, dtype=torch.float64) + 0.5
        inputs[node.attrs["name"]] = value
    leaves = {
        k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()
    }
    result = Interpreter(before, {}, torch.float64).run("main", leaves)
    grad = torch.randn(result.shape, generator=random, dtype=torch.float64)
    (result * grad).sum().backward()
    with torch.no_grad():
        found = gradients(Interpreter(derived, {}, torch.float64), "main", {**inputs, "grad": grad})
    wanted = {k: v.grad for k, v in leaves.items() if v.is_floating_point()}
    torch.testing.assert_close(found.inputs, wanted, rtol=1e-9, atol=1e-9)
    return found, inputs


X = '  %x = input name="x" : f32[t, a, b]\n'
CASES = {
    "mul, broadcast": X + '  %z = input name="z" : f32[b, c]\n'
    '  %y = map(%x, %z) fn="mul" : f32[t, a, b, c]',
    "one operand twice": X + '  %y = map(%x, %x) fn="mul" : f32[t, a, b]',
    "contract": X + '  %z = input name="z" : f32[c, b]\n'
    '  %y = contract(%x, %z) over=("b") : f32[t, a, c]',
    "contract, three": X + '  %z = input name="z" : f32[c, b]\n  %w = input name="w" : f32[a, c]\n'
    '  %y = contract(%x, %z, %w) over=("b", "a") : f32[t, c]',
    "contract, a sum over one operand alone": X + '  %z = input name="z" : f32[c]\n'
    '  %y = contract(%x, %z) over=("a", "b") : f32[t, c]',
    "contract, one": X + '  %y = contract(%x) over=("b") : f32[t, a]',
    "sum": X + '  %y = reduce(%x) fn="sum" over=("a", "b") : f32[t]',
    "mean": X + '  %y = reduce(%x) fn="mean" over=("a", "t") : f32[b]',
    "max": X + '  %y = reduce(%x) fn="max" over=("b") : f32[t, a]',
    "min": X + '  %y = reduce(%x) fn="min" over=("a", "b") : f32[t]',
    "softmax": X + '  %y = softmax(%x) over="b" : f32[t, a, b]',
    "cast": X + "  %y = cast(%x) : act[t, a, b]",
    "top": X + '  %y = top(%x) over="b" to="k" : f32[t, a, k]',
    "gather": '  %x = input name="x" : f32[b, c]\n  %i = input name="i" : i64[t, k] of b\n'
    '  %y = gather(%x, %i) dim="b" : f32[t, k, c]',
    "gather, a dim shared": X + '  %i = input name="i" : i64[t, k] of b\n'
    '  %y = gather(%x, %i) dim="b" : f32[t, k, a]',
    "flatten": X + '  %y = flatten(%x) dims=("b", "a") into=`(b,a)` : f32[t, (b,a)]',
    "unflatten": '  %x = input name="x" : f32[t, (a,b)]\n'
    '  %y = unflatten(%x) dim="(a,b)" into=(`a`, `b`) : f32[t, a, b]',
    "part": '  %x = input name="x" : f32[t, b|c]\n  %y = part(%x) dim="b|c" part="c" : f32[t, c]',
    "both parts": '  %x = input name="x" : f32[t, b|c]\n'
    '  %l = part(%x) dim="b|c" part="b" : f32[t, b]\n'
    '  %r = part(%x) dim="b|c" part="c" : f32[t, c]\n'
    '  %y = map(%l, %r) fn="mul" : f32[t, b, c]',
    "select": X + '  %y = select(%x) dim="a" at=1 : f32[t, b]',
    "rename": X + '  %y = rename(%x) dim="b" to=`n` : f32[t, a, n]',
    "expand": X + "  %y = expand(%x) dims=(`c`) : f32[t, a, b, c]",
    "select_rows": X + "  %y = select_rows(%x) : f32[r, a, b]",
    "concat": '  %x = input name="x" : f32[t, b]\n  %z = input name="z" : f32[t, c]\n'
    "  %y = concat(%x, %z) dim=`b|c` : f32[t, b|c]",
    "stack": X + '  %z = input name="z" : f32[t, a, b]\n'
    "  %y = stack(%x, %z) dim=`two` : f32[t, a, b, two]",
    "cache": X + '  %y = cache(%x) name="past" : f32[s, a, b]',
    "shift": '  %x = input name="x" : f32[t, a]\n  %past = cache(%x) name="past" : f32[s, a]\n'
    '  %y = shift(%past) history="s" sign=1 offset=<-k> index="k" : f32[t, k, a]',
    "shift, one token": '  %x = input name="x" : f32[t, a]\n'
    '  %past = cache(%x) name="past" : f32[s, a]\n'
    '  %y = shift(%past) history="s" sign=1 offset=<-2> : f32[t, a]',
}


@given(a=st.integers(2, 4), b=st.integers(2, 5), c=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=4)
@pytest.mark.parametrize("case", CASES)
def test_an_op(case: str, a: int, b: int, c: int, seed: int) -> None:
    run(CASES[case], {"a": a, "b": b, "c": c, "k": 2}, seed)


@given(a=st.integers(1, 4), b=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=3)
@pytest.mark.parametrize("fn", sorted(ELEMENTWISE))
def test_a_function(fn: str, a: int, b: int, seed: int) -> None:
    other = '  %z = input name="z" : f32[b, c]\n'
    body = {
        1: '  %less = constant value=0.9 : act[]\n  %v = map(%x, %less) fn="sub" : f32[t, a, b]\n'
        f'  %y = map(%v) fn="{fn}" : f32[t, a, b]',
        2: other + f'  %y = map(%x, %z) fn="{fn}" : f32[t, a, b, c]',
        3: other + '  %when = map(%x, %z) fn="lt" : bool[t, a, b, c]\n'
        '  %y = map(%when, %x, %z) fn="where" : f32[t, a, b, c]',
    }
    takes = 3 if fn == "where" else 2 if fn in BINARY else 1
    nodes = X + body[takes]
    if fn in ("log", "sqrt", "rsqrt"):
        nodes = nodes.replace('fn="sub"', 'fn="add"')
    run(nodes, {"a": a, "b": b, "c": 2, "k": 1}, seed)


@pytest.mark.parametrize("value", ["0.5", "3", "2", "-1.5"])
def test_a_constant_power(value: str) -> None:
    dtype = "i64" if value.isdigit() else "act"
    lines = f'  %n = constant value={value} : {dtype}[]\n  %y = map(%x, %n) fn="pow" : f32[t, a, b]'
    run(X + lines, {"a": 2, "b": 3, "c": 1, "k": 1})


def test_masked_scores_have_no_gradient() -> None:
    body = """\
  %x = input name="x" : f32[t, a, s]
  %t = position : i64[t]
  %s = position : i64[s]
  %seen = map(%s, %t) fn="lt" : bool[t, s]
  %inf = constant value=-inf : act[]
  %score = map(%seen, %x, %inf) fn="where" : f32[t, a, s]
  %y = softmax(%score) over="s" : f32[t, a, s]"""
    found, _ = run(body, {"a": 2, "b": 1, "c": 1, "k": 1}, length=4)
    assert not found.inputs["x"][0].any()  # the first token sees nothing: a row of -inf
    assert found.inputs["x"].isfinite().all()


def test_equal_values_share_the_gradient_of_a_maximum() -> None:
    body = '  %x = input name="x" : f32[t]\n  %y = map(%x, %x) fn="max" : f32[t]'
    found, _ = run(body, {"a": 1, "b": 1, "c": 1, "k": 1})
    assert found.inputs["x"].any()


@pytest.mark.parametrize("case", ["softmax", "contract, three", "mean", "gather, a dim shared"])
def test_finite_differences_agree(case: str) -> None:
    sizes = {"a": 3, "b": 4, "c": 2, "k": 2}
    found, inputs = run(CASES[case], sizes)
    before = Interpreter(program(CASES[case], sizes), {}, torch.float64)
    random = torch.Generator().manual_seed(7)
    grad = torch.randn(before.run("main", inputs).shape, generator=random, dtype=torch.float64)
    derived = differentiate.run(before.program)
    found = gradients(Interpreter(derived, {}, torch.float64), "main", {**inputs, "grad": grad})
    direction = torch.randn(inputs["x"].shape, generator=random, dtype=torch.float64)

    def value(step: float) -> float:
        moved = {**inputs, "x": inputs["x"] + step * direction}
        return float((before.run("main", moved) * grad).sum())

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    assert math.isclose(slope, float((found.inputs["x"] * direction).sum()), rel_tol=1e-6)


def test_every_op_has_an_adjoint_or_a_reason() -> None:
    """An op that someone adds is in the table of adjoints, or says in ``NONE`` why it is not."""
    composites = {n for n, op in spec.TABLE.items() if op.composite}
    assert NONE.keys() >= spec.TABLE.keys() - ADJOINTS.keys() - BODIES - composites
    assert not NONE.keys() & ADJOINTS.keys()
    assert all(NONE.values())
    assert NONE.keys() > ENDS
    assert spec.TABLE["softmax"].adjoint is ADJOINTS["softmax"]
    assert spec.TABLE["argtop"].adjoint is None
    assert ELEMENTWISE.keys() | STEPS == FUNCTIONS


def test_an_op_without_an_adjoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without = {op: adjoint for op, adjoint in ADJOINTS.items() if op != "top"}
    monkeypatch.setattr("compiler.passes.differentiate.ADJOINTS", without)
    body = CASES["top"] + "  // model.arch:7"
    with pytest.raises(UserError) as error:
        differentiate.run(program(body, {"a": 2, "b": 3, "c": 1, "k": 2}))
    assert str(error.value) == "model.arch:7: the op top has no adjoint"


def test_a_result_without_a_parameter() -> None:
    lines = '  %i = input name="i" : i64[t] of a\n  %y = cast(%i) : f32[t]'
    with pytest.raises(UserError) as error:
        differentiate.run(program(lines, {"a": 2, "b": 3, "c": 1, "k": 2}))
    assert str(error.value) == "nothing in the result of 'main' depends on a parameter"
