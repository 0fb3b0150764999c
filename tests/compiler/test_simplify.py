"""Values that are another value are left out; names stay."""

from lowered import Body, agree, dim, program, t

from compiler.ir import Graph
from compiler.passes import simplify

d = dim("d", "hidden")


def simplified(graph: Graph) -> Graph:
    before = program(graph, {"hidden": 4})
    after = before.with_bodies({graph.name: simplify.run_on(graph)})
    agree(before, after)
    return after.bodies[graph.name]


def shown(graph: Graph) -> list[str]:
    return [f"{n.attrs.get('fn', n.op)} {n.label or ''}".strip() for n in graph]


def test_a_product_with_one() -> None:
    b = Body("M.call")
    x = b.map("exp", b.input("x", t, d))
    x = b.map("div", b.map("mul", b.constant(1.0), x), b.constant(1))
    assert shown(simplified(b.done(b.map("mul", x, b.constant(2.0))))) == [
        "input", "exp", "constant", "mul"
    ]  # fmt: skip


def test_a_named_cast_names_what_it_casts() -> None:
    """``q = f(x)`` where the function's result is named too: one rounding, called q."""
    b = Body("M.call")
    wide = b.map("exp", b.cast(b.input("x", t, d)))
    result = b.cast(wide, "act", rounds=True)
    graph = simplified(b.done(b.cast(result, "act", name="q", rounds=True)))
    assert shown(graph) == ["input", "cast", "exp", "cast q"]
    assert graph.result.rounds


def test_a_value_with_two_names_keeps_both() -> None:
    b = Body("M.call")
    first = b.map("exp", b.input("x", t, d), name="first", rounds=True)
    second = b.cast(first, "act", name="second", rounds=True)
    assert shown(simplified(b.done(second))) == ["input", "exp first", "cast second"]


def test_a_rounding_stays_where_its_source_is_read_elsewhere() -> None:
    b = Body("M.call")
    let = b.map("exp", b.input("x", t, d))
    rounded = b.cast(let, "act", rounds=True)
    graph = simplified(b.done(b.map("add", let, rounded)))
    assert shown(graph) == ["input", "exp", "cast", "add"]
