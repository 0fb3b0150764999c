"""Attention, norms, routed experts and silu are found by their structure, whatever the spelling."""

from collections.abc import Callable
from math import inf

import pytest
from lowered import (
    PUBLISHED,
    Body,
    agree,
    dim,
    low_rank_attention,
    program,
    s,
    shared_key_attention,
    t,
)

from compiler.ir import Child, Dim, Node, Program, Rewriter, Type
from compiler.passes import hoist, masks, order, recognise
from compiler.verify import problems

GROUPED = {"hidden": 4096, "kv_heads": 8, "per_group": 4, "width": 128}
d, g, n = dim("d", "hidden"), dim("g", "heads"), dim("n", "width")


def recognised(before: Program) -> Program:
    """The program after the pass, which is held to be well-formed and the same."""
    after = recognise.run(before)
    agree(before, after)
    return after


def composites(program: Program, op: str) -> list[Node]:
    return [node for graph in program.bodies.values() for node in graph if node.op == op]


def the(program: Program, op: str) -> Node:
    (node,) = composites(program, op)
    return node


# -- attention -----------------------------------------------------------------------------------


def test_grouped_attention() -> None:
    node = the(recognised(hoist.run(shared_key_attention(GROUPED))), "attention")
    assert node.inputs[:3] == ("q", "keys", "values")
    assert {k: v for k, v in node.attrs.items() if k != "body"} == {
        "terms": ((0, 1, ("n",)),),
        "value": 2,
        "scale": 0.25,
        "mask": (0, None),
        "mask_operands": (3, 4),
        "time": "t",
        "history": "s",
        "heads": ("k", "m"),
        "values": ("n",),
        "softmax_dtype": "act",
    }


def test_a_sliding_window() -> None:
    node = the(recognised(shared_key_attention(GROUPED, window=512)), "attention")
    assert node.attrs["mask"] == (0, 512)


def test_both_sides_of_an_absorbed_attention() -> None:
    ordered = hoist.run(order.run(low_rank_attention()))
    after = recognised(ordered)
    absorbed, expanded = composites(after, "attention")
    # The latent is key and value at once, and shared by all heads.
    assert absorbed.inputs[:2] == ("q_Up", "latent")
    assert absorbed.attrs["terms"] == ((0, 1, ("z",)), (2, 3, ("e",)))
    assert absorbed.attrs["value"] == 1
    assert absorbed.attrs["values"] == ("z",)
    assert expanded.attrs["terms"] == ((0, 1, ("a",)), (2, 3, ("e",)))
    assert expanded.attrs["value"] == 4
    assert expanded.attrs["scale"] == absorbed.attrs["scale"] == 0.072
    assert expanded.attrs["mask"] == absorbed.attrs["mask"] == (0, None)
    # What a kernel reads is act: no operand is widened outside of it.
    for node in (absorbed, expanded):
        graph = next(g for g in after.bodies.values() if node.name in g and g[node.name] is node)
        assert {graph[i].type.dtype for i in node.inputs} == {"act", "i64"}
        assert not [n for n in graph if n.op in ("softmax", "cast")]


Attend = Callable[[Body, str, str, str], str]


def attended(write: Callable[[Body, str], str]) -> Program:
    """q, k, v and the scores of one term; ``write`` goes on from there to the probabilities."""
    b = Body("M.call")
    q = b.input("q", t, g, n)
    k = b.cache(b.input("k", t, g, n), "k")
    v = b.cache(b.input("v", t, g, n), "v")
    p = write(b, b.contract(b.cast(q), b.cast(k), over="n"))
    out = b.cast(b.contract(p, b.cast(v), over="s"), "act", rounds=True)
    return program(b.done(out), {"heads": 4, "width": 16})


def causal(b: Body) -> str:
    return b.map("le", b.position(s), b.position(t))


def scaled_after_the_mask(b: Body, score: str) -> str:
    masked = b.map("where", causal(b), score, b.constant(-inf))
    return b.softmax(b.map("div", masked, b.constant(4.0)))


def masked_by_adding(b: Body, score: str) -> str:
    mask = b.map("where", causal(b), b.constant(0.0), b.constant(-inf))
    return b.softmax(b.map("add", b.map("mul", b.constant(0.25), score), mask))


def hidden_rather_than_seen(b: Body, score: str) -> str:
    later = b.map("gt", b.position(s), b.position(t))
    score = b.map("mul", b.map("mul", score, b.constant(0.5)), b.constant(0.5))
    return b.softmax(b.map("where", later, b.constant(-inf), score))


def by_distance(b: Body, score: str) -> str:
    score = b.map("mul", score, b.constant(0.25))
    distance = b.map("sub", b.position(t), b.position(s))
    ahead = b.map("not", b.map("lt", distance, b.constant(0)))
    return b.softmax(b.map("where", ahead, score, b.constant(-inf)))


def probabilities_in_act(b: Body, score: str) -> str:
    masked = b.map("where", causal(b), b.map("mul", score, b.constant(0.25)), b.constant(-inf))
    return b.cast(b.softmax(masked), "act")


@pytest.mark.parametrize(
    "write",
    [
        scaled_after_the_mask,
        masked_by_adding,
        hidden_rather_than_seen,
        by_distance,
        probabilities_in_act,
    ],
)
def test_spellings_of_causal_attention(write: Callable[[Body, str], str]) -> None:
    node = the(recognised(attended(write)), "attention")
    assert node.attrs["scale"] == 0.25
    assert node.attrs["mask"] == (0, None)


def test_attention_without_a_mask() -> None:
    node = the(recognised(attended(lambda b, score: b.softmax(score))), "attention")
    assert (node.attrs["mask"], node.attrs["mask_operands"], node.attrs["scale"]) == (None, (), 1)


def test_a_mask_that_is_no_interval_stays_an_expression() -> None:
    """The first four positions are always seen (attention sinks)."""

    def write(b: Body, score: str) -> str:
        at, past = b.position(t), b.position(s)
        near = b.map("lt", b.map("sub", at, past), b.constant(8))
        seen = b.map("or", near, b.map("lt", past, b.constant(4)))
        seen = b.map("and", b.map("le", past, at), seen)
        return b.softmax(b.map("where", seen, score, b.constant(-inf)))

    after = recognised(attended(write))
    node = the(after, "attention")
    mask = after.bodies[node.attrs["mask"]]
    assert mask.result.type.dtype == "bool"
    assert [i.type for i in mask.inputs] == [
        after.bodies["M.call"][node.inputs[i]].type for i in node.attrs["mask_operands"]
    ]


def seen_alone(b: Body, score: str) -> str:
    return b.map("where", causal(b), score, b.constant(-inf))


def capped(b: Body, score: str) -> str:
    """2 tanh(score / 8): the fourth is a scale, and the score's own."""
    bent = b.map("tanh", b.map("div", b.map("mul", score, b.constant(0.5)), b.constant(4.0)))
    return b.map("mul", b.constant(2.0), bent)


def read_twice(b: Body, score: str) -> str:
    return b.map("mul", b.map("sigmoid", score), b.map("add", score, b.constant(1.0)))


@pytest.mark.parametrize(("bent", "scale"), [(capped, 0.125), (read_twice, 1)])
def test_a_function_of_the_score(bent: Callable[[Body, str], str], scale: float) -> None:
    """It is kept as a function of one number; what multiplies the products is their scale."""
    after = recognised(attended(lambda b, score: b.softmax(seen_alone(b, bent(b, score)))))
    node = the(after, "attention")
    assert (node.attrs["scale"], node.attrs["mask"]) == (scale, (0, None))
    function = after.bodies[node.attrs["score"]]
    assert [i.type for i in function.inputs] == [function.result.type] == [Type("f32", ())]
    assert not [n for n in after.bodies["M.call"] if {t, s} <= set(n.type.dims)]


def with_a_sink(b: Body, score: str, high: str, logit: str) -> str:
    """exp(score - high) / (sum of these + exp(logit - high))"""
    wide = b.type(score).dims
    repeated = b("expand", high, type=Type("f32", (*b.type(high).dims, s)), dims=(s,))
    e = b.map("exp", b.map("sub", score, repeated))
    term = b.map("exp", b.map("sub", logit, high))
    p = b.map("div", e, b.map("add", b.reduce("sum", e, "s"), term))
    assert set(b.type(p).dims) == set(wide)
    return p


def test_a_logit_of_each_head_beside_the_scores() -> None:
    def write(b: Body, score: str) -> str:
        sink = b.param("sink", g)
        score = seen_alone(b, capped(b, score))
        high = b.map("max", b.reduce("max", score, "s"), b.cast(sink))
        return with_a_sink(b, score, high, b.cast(sink))

    node = the(recognised(attended(write)), "attention")
    assert node.inputs[node.attrs["sink"]] == "sink"  # as it is stored
    assert (node.attrs["scale"], node.attrs["mask"]) == (0.125, (0, None))
    assert "score" in node.attrs


def test_a_sum_that_is_another_ones_denominator_is_no_softmax() -> None:
    def write(b: Body, score: str) -> str:
        sink = b.cast(b.param("sink", g))
        score = seen_alone(b, score)
        high, other = (b.reduce(fn, score, "s") for fn in ("max", "min"))
        repeated = b("expand", high, type=Type("f32", (*b.type(high).dims, s)), dims=(s,))
        e = b.map("exp", b.map("sub", score, repeated))
        term = b.map("exp", b.map("sub", sink, other))
        return b.map("div", e, b.map("add", b.reduce("sum", e, "s"), term))

    assert not composites(recognise.run(attended(write)), "attention")


def test_attributes_that_do_not_fit_an_attention() -> None:
    after = recognised(attended(lambda b, score: b.softmax(seen_alone(b, capped(b, score)))))
    graph = after.bodies["M.call"]
    node = the(after, "attention")

    def told(**attrs: object) -> str:
        changed = {**node.attrs, **attrs}
        made = Rewriter(graph)
        for old in graph:
            made.replace(
                old.name, made.copy(old, **({"attrs": changed} if old is node else {})).name
            )
        (problem,) = problems(after.with_bodies({**after.bodies, "M.call": made.done()}))
        return problem.message

    assert told(sink=9) == "there are 5 operands (in module M)"
    assert told(sink=0) == "a sink is of heads alone, not of n, t (in module M)"
    body = node.attrs["body"]
    assert told(score=body) == f"{body} is no f32[] -> f32[] (in module M)"
    assert told(score="nothing") == "there is no body 'nothing'"


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (lambda b, score: b.map("sigmoid", score), "no softmax"),
        (lambda b, score: b.softmax(b.map("tanh", seen_alone(b, score))), "what is hidden is seen"),
        (
            lambda b, score: b.softmax(b.map("add", b.map("tanh", score), b.param("slope", g))),
            "a function of two values",
        ),
        (lambda b, score: b.softmax(b.cast(score, "act", rounds=True)), "rounded scores"),
    ],
)
def test_what_is_no_attention_is_left_alone(write: Callable[[Body, str], str], why: str) -> None:
    assert not composites(recognised(attended(write)), "attention"), why


def test_probabilities_that_are_wanted_too_are_not_computed_twice() -> None:
    b = Body("M.call")
    q, v = b.input("q", t, g, n), b.cache(b.input("v", t, g, n), "v")
    p = b.softmax(b.contract(q, v, over="n"))
    out = b.map("add", b.contract(p, v, over="s"), b.reduce("max", p, "s"))
    assert not composites(recognised(program(b.done(out), PUBLISHED)), "attention")


# -- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "length", "share"),
    [
        ((0, None), 4096, 4097 / 8192),
        ((0, 4), 8, 26 / 64),
        ((None, None), 5, 1),
        ((-1, 2), 4, 10 / 16),
    ],
)
def test_how_much_a_mask_shows(mask: masks.Interval, length: int, share: float) -> None:
    assert masks.visible(mask, length) == share


# -- norms ---------------------------------------------------------------------------------------


def normed(write: Callable[[Body, str], str], gain: bool = True) -> Program:
    b = Body("M.call")
    x = b.input("x", t, d)
    unit = write(b, x)
    if gain:
        unit = b.map("mul", b.param("gain", d), unit)
    y = b.cast(unit, "act", name="y", rounds=True) if b.type(unit).dtype == "f32" else unit
    return program(b.done(y), {"hidden": 64})


def square(b: Body, x: str) -> str:
    return b.map("add", b.reduce("mean", b.map("mul", x, x), "d"), b.constant(1e-6))


def by_rsqrt(b: Body, x: str) -> str:
    wide = b.cast(x)
    return b.map("mul", wide, b.map("rsqrt", square(b, wide)))


def by_root(b: Body, x: str) -> str:
    return b.map("div", x, b.map("sqrt", square(b, x)))


def by_power(b: Body, x: str) -> str:
    wide = b.cast(x)
    mean = b.reduce("mean", b.map("pow", wide, b.constant(2)), "d")
    root = b.map("pow", b.map("add", b.constant(1e-6), mean), b.constant(-0.5))
    return b.map("mul", root, wide)


def by_reciprocal(b: Body, x: str) -> str:
    root = b.map("sqrt", square(b, b.cast(x)))
    return b.map("mul", b.cast(x), b.map("div", b.constant(1.0), root))


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("write", [by_rsqrt, by_root, by_power, by_reciprocal])
def test_spellings_of_a_norm(write: Callable[[Body, str], str], gain: bool) -> None:
    after = recognised(normed(write, gain))
    node = the(after, "rms_norm")
    assert (node.attrs["over"], node.attrs["eps"]) == (("d",), 1e-6)
    assert node.inputs == (("x", "gain") if gain else ("x",))
    assert node.attrs["gain"] == (1 if gain else None)
    assert not node.attrs["rounds_before_gain"]
    assert node.type.dtype == "act"


def test_a_norm_that_rounds_before_its_gain() -> None:
    def write(b: Body, x: str) -> str:
        return b.cast(by_rsqrt(b, x), "act", name="unit", rounds=True)

    node = the(recognised(normed(write)), "rms_norm")
    assert node.attrs["gain"] == 1
    assert node.attrs["rounds_before_gain"]


def test_a_root_that_divides_something_else_is_no_norm() -> None:
    def write(b: Body, x: str) -> str:
        return b.map("mul", b.map("exp", x), b.map("rsqrt", square(b, x)))

    assert not composites(recognised(normed(write)), "rms_norm")


# -- routed experts, silu ------------------------------------------------------------------------


def routed(summed: bool = False) -> Program:
    k, e, rows = dim("k", "picks"), dim("e", "experts"), dim("R")
    block = Body("Block.call")
    x = block.input("x", rows, d)
    inner = block.contract(block.param("W", n, d), x, over="d", name="gate", rounds=True)
    gated = block.map("mul", block.map("sigmoid", inner), inner)
    expert = block.done(block.contract(block.param("V", d, n), gated, over="n", rounds=True))

    b = Body("M.call")
    x = b.input("x", t, d)
    score = b.contract(b.param("C", e, d), x, over="d")
    pick = b("argtop", score, type=Type("i64", (t, k), of=e), name="pick", over="e", to="k")
    gate = b.cast(b("top", score, type=Type("act", (t, k)), over="e", to="k"))
    out = b(
        "apply",
        pick,
        x,
        type=Type("act", (t, k, d)),
        body=expert.name,
        child="expert",
        over="e",
        rows=("t", "k"),
        dims=(),
    )
    if summed:
        y = b.reduce("sum", b.map("mul", b.cast(out), gate), "k")
    else:
        y = b.contract(gate, b.cast(out), over="k")
    sizes = {"hidden": 64, "width": 32, "experts": 8, "picks": 2}
    made = program(b.done(y), sizes, {"expert": expert})
    modules = dict(made.modules)
    root = modules["M"]
    modules["M"] = type(root)(
        root.name,
        root.block,
        root.parameters,
        (Child("expert", "expert", e),),
        methods=root.methods,
    )
    return type(made)(made.name, made.constants, made.root, modules, made.bodies, made.entries)


@pytest.mark.parametrize("summed", [False, True])
def test_routed_experts(summed: bool) -> None:
    after = recognised(routed(summed))
    node = the(after, "experts")
    assert node.inputs[0] == "pick"
    assert after.bodies["M.call"][node.inputs[1]].op == "top"  # the gate, not its cast
    assert {k: v for k, v in node.attrs.items() if k != "body"} == {
        "block": "Block.call",
        "child": "expert",
        "over": "e",
        "rows": ("t", "k"),
        "dims": (),
        "picks": "k",
    }
    assert {n.op for n in after.bodies["M.call"]} == {
        "input", "param", "contract", "top", "argtop", "experts"
    }  # fmt: skip


def test_x_times_its_sigmoid_is_silu() -> None:
    block = recognised(routed()).bodies["Block.call"]
    (silu,) = (node for node in block if node.op == "map")
    assert (silu.attrs["fn"], silu.inputs) == ("silu", ("gate",))


def test_sums_of_dims_survive() -> None:
    """A pass keeps what it does not know."""
    both = Dim.sum([n, g])
    b = Body("M.call")
    x = b.part(b.input("x", t, both), both, "n")
    before = program(b.done(x), PUBLISHED)
    assert [n.op for n in recognised(before).bodies["M.call"]] == ["input", "part"]
