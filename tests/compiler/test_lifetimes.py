"""What is dead after each node, and how many bytes are alive at most."""

from lowered import Body, agree, dim, low_rank_attention, program, t

from compiler.cost import lengths
from compiler.ir import Graph
from compiler.passes import hoist, lifetimes, order, recognise
from compiler.text import parse, program_text, same

d, f, e, o = dim("d", "hidden"), dim("f", "ffn"), dim("e", "half"), dim("o", 2)
SIZES = {"hidden": 16, "ffn": 64, "half": 8}


def gated() -> Graph:
    b = Body("M.call")
    x = b.input("x", t, d)
    gate = b.contract(b.param("G", f, d), x, over="d", name="gate")
    up = b.contract(b.param("U", f, d), x, over="d", name="up")
    a = b.map("mul", gate, up, name="a")
    return b.done(b.contract(b.param("D", d, f), a, over="f", name="y"))


def frees(graph: Graph) -> dict[str, tuple[str, ...]]:
    return {n.name: n.attrs["frees"] for n in graph if "frees" in n.attrs}


def test_a_value_is_freed_where_it_is_read_last() -> None:
    before = program(gated(), SIZES)
    after = lifetimes.run(before)
    assert frees(after.bodies["M.call"]) == {"a": ("gate", "up"), "y": ("a",)}
    assert same(parse(program_text(after)), after)
    assert same(lifetimes.run(after), after)


def test_live_bytes_are_polynomials() -> None:
    live = lifetimes.live(gated())
    assert str(live["a"]) == "6 * ffn * time"  # gate, up and their product, two bytes each
    assert str(live["y"]) == "2 * ffn * time + 2 * hidden * time"


def test_a_view_keeps_its_source_alive() -> None:
    b = Body("M.call")
    x = b.map("neg", b.input("x", t, d), name="source")
    halves = b.unflatten(x, d, e, o)
    y = b.map("exp", halves, name="y")
    graph = b.done(b.map("exp", y, name="z"))
    live = lifetimes.live(graph)
    assert str(live["source"]) == "2 * hidden * time"
    assert live["y"].at({**SIZES, "time": 3}) == 2 * 2 * 16 * 3
    assert live["z"].at({**SIZES, "time": 3}) == 2 * 2 * 16 * 3  # the source went with its view


def test_tables_made_at_load_are_not_freed() -> None:
    b = Body("M.call")
    table = b.map("cos", b.iota(d), name="table")
    graph = b.done(b.map("mul", b.input("x", t, d), table))
    assert frees(lifetimes.run(program(graph, SIZES)).bodies["M.call"]) == {}
    assert str(lifetimes.live(graph)[graph.output]) == "4 * hidden * time"


def test_what_a_body_runs_counts() -> None:
    inner = gated()
    outer = Body("Top.call")
    x = outer.input("x", t, d)
    y = outer.call(inner, "block", x)
    made = program(outer.done(outer.map("add", x, y)), SIZES, {"block": inner})
    at = lengths(SIZES, time=5)
    result = 2 * 16 * 5
    assert lifetimes.peak(made, "M.call", at) == 6 * 64 * 5
    assert lifetimes.peak(made, "Top.call", at) == result + 6 * 64 * 5


def test_attention_needs_no_memory_for_its_scores() -> None:
    made = hoist.run(order.run(low_rank_attention()))
    at = lengths(made.sizes, time=4096)
    apart, fused = (lifetimes.peak(p, "Attend.call", at) for p in (made, recognise.run(made)))
    assert apart > 2 * 4 * 128 * 4096**2  # scores and probabilities in f32
    assert fused < 4 * 128 * 4096**2


def test_the_meaning_stays() -> None:
    before = low_rank_attention()
    agree(before, lifetimes.run(before))
