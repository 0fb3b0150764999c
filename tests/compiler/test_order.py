"""Contractions in their cheapest order; a branch where the number of positions decides."""

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

from compiler.ir import Dim, Graph, Node, Program
from compiler.passes import order

i, j, r, d = dim("i", "rows"), dim("j", "columns"), dim("r", "rank"), dim("d", "hidden")


def branches(program: Program) -> list[Node]:
    return [n for graph in program.bodies.values() for n in graph if n.op == "branch"]


def limit(program: Program) -> int:
    (branch,) = branches(program)
    length, relation, number = branch.attrs["when"]
    assert (length, relation) == ("time", "<=")
    return int(number)


def products(graph: Graph) -> list[str]:
    """The contractions as equations."""
    return [
        f"{n.type} = {' * '.join(str(o.type) for o in graph.operands(n))}"
        for n in graph
        if n.op == "contract"
    ]


# -- low-rank attention --------------------------------------------------------------------------


def test_few_positions_absorb_and_many_expand() -> None:
    ordered = order.run(low_rank_attention())
    (branch,) = branches(ordered)
    few, many = (ordered.bodies[branch.attrs[side]] for side in ("then", "otherwise"))
    assert products(few) == [
        "act[t, g, z] = act[t, g, a] * act[g, a, z]",  # the query meets the weight
        "f32[t, g, s] = f32[t, g, z] * f32[s, z]",  # and then the latent
        "f32[t, g, s] = f32[t, g, e] * f32[s, e]",
        "f32[t, g, z] = f32[t, g, s] * f32[s, z]",
        "act[t, g, o] = act[t, g, z] * act[g, o, z]",
    ]
    assert products(many) == [
        "act[g, a, s] = act[g, a, z] * act[s, z]",  # the weight meets the latent: keys
        "act[g, o, s] = act[g, o, z] * act[s, z]",
        "f32[t, g, s] = f32[t, g, a] * f32[g, a, s]",
        "f32[t, g, s] = f32[t, g, e] * f32[s, e]",
        "f32[t, g, o] = f32[t, g, s] * f32[g, o, s]",
    ]
    # Each side is a whole attention: what goes in has no dims over both time and history.
    assert [str(n.type) for n in few.inputs] == [str(n.type) for n in many.inputs]
    assert [n.name for n in few.inputs][2:] == ["latent", "turned"]


def test_the_published_sizes_cross_between_157_and_171_positions() -> None:
    # By FLOPs alone: rank * (width + out) / (2 * rank - width - out) = 170.7 at an endless history
    # and 163.8 at one of 4,096.
    assert limit(order.run(low_rank_attention())) == 163


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({"rank": 1024}, 141), ({"width": 192, "out": 192}, 285), ({"turned": 32}, 163)],
)
def test_the_crossing_moves_with_the_sizes(changed: dict[str, int], expected: int) -> None:
    sizes = PUBLISHED | changed
    assert limit(order.run(low_rank_attention(sizes))) == expected
    z, w = sizes["rank"], sizes["width"] + sizes["out"]
    assert expected == z * w * 4096 // (4096 * (2 * z - w) + z * w)  # where FLOPs decide


def test_small_sizes_absorb_too() -> None:
    """Where bytes decide: never a product of queries and latents that no weight has summed."""
    small = {"hidden": 256, "heads": 4, "rank": 64, "width": 32, "turned": 16, "out": 32}
    ordered = order.run(low_rank_attention(small))
    few = ordered.bodies[branches(ordered)[0].attrs["then"]]
    assert "act[t, g, z] = act[t, g, a] * act[g, a, z]" in products(few)
    assert max(len(n.type.dims) for n in few) == 3
    assert limit(ordered) > 64  # what FLOPs alone would say


def test_no_branch_where_absorbing_always_wins() -> None:
    """A latent so narrow that scores against it are cheaper than against keys."""
    after = order.run(low_rank_attention(PUBLISHED | {"rank": 64}))
    assert not branches(after)
    assert products(after.bodies["Attend.call"])[3] == "act[t, g, z] = act[t, g, a] * act[g, a, z]"


def test_a_plain_name_marks_a_rounding_and_stays() -> None:
    ordered = order.run(low_rank_attention(rounds=True))
    assert "keys" in ordered.bodies["Attend.call"]
    few = ordered.bodies[branches(ordered)[0].attrs["then"]]
    assert "f32[t, g, s] = f32[t, g, a] * f32[g, a, s]" in products(few)


def test_one_let_for_keys_and_values_is_two_products() -> None:
    apart, joint = (order.run(low_rank_attention(joint=joint)) for joint in (False, True))
    assert limit(apart) == limit(joint)
    for side in ("Attend.call.few", "Attend.call.many"):
        assert len(products(apart.bodies[side])) == len(products(joint.bodies[side])) == 5


@pytest.mark.parametrize("case", [{}, {"joint": True}, {"rounds": True}])
def test_both_sides_compute_the_same(case: dict[str, bool]) -> None:
    before = low_rank_attention(**case)  # type: ignore[arg-type]
    agree(before, order.run(before))


def test_full_rank_attention_has_no_branch() -> None:
    sizes = {"hidden": 4096, "kv_heads": 8, "per_group": 8, "width": 128}
    before = shared_key_attention(sizes)
    assert not branches(order.run(before))
    assert products(order.run(before).bodies["Attend.call"]) == products(
        before.bodies["Attend.call"]
    )


# -- chains of other shapes ----------------------------------------------------------------------


def low_rank_product(let: bool) -> Program:
    b = Body("M.call")
    x = b.input("x", t, j)
    a, c = b.param("A", i, r), b.param("B", r, j)
    if let:
        y = b.contract(b.contract(a, c, over="r", name="wide"), x, over="j", name="y", rounds=True)
    else:
        y = b.contract(a, c, x, over="r j", name="y", rounds=True)
    return program(b.done(y), {"rows": 64, "columns": 64, "rank": 4})


@pytest.mark.parametrize("let", [True, False])
def test_weights_are_never_multiplied_with_each_other(let: bool) -> None:
    before = low_rank_product(let)
    after = order.run(before)
    assert products(after.bodies["M.call"]) == [
        "act[t, r] = act[r, j] * act[t, j]",
        "act[t, i] = act[i, r] * act[t, r]",
    ]
    assert not branches(after)
    agree(before, after)


def test_a_value_read_twice_is_computed_once() -> None:
    b = Body("M.call")
    x = b.input("x", t, j)
    half = b.contract(b.param("B", r, j), x, over="j", name="half")
    one = b.contract(b.param("A", i, r), half, over="r")
    two = b.contract(b.param("C", i, r), half, over="r")
    graph = b.done(b.map("add", one, two))
    after = order.run(program(graph, {"rows": 64, "columns": 64, "rank": 4})).bodies["M.call"]
    assert products(after) == products(graph)


def test_inner_sums_keep_their_dims_apart() -> None:
    """The inner product sums d, and the outer result has a d: they are not one dim."""
    b = Body("M.call")
    x = b.input("x", t, d)
    up = b.contract(b.param("U", r, d), x, over="d", name="up")
    y = b.contract(b.param("W", d, r), up, b.param("gain", d), over="r", name="y")
    before = program(b.done(y), {"rank": 64, "hidden": 64})
    agree(before, order.run(before))


def test_stacked_keys_are_a_sum_of_products() -> None:
    """q over n|e with keys stacked from their own and a shared part: the stack is not built."""
    b = Body("M.call")
    n, e, g = dim("n", "width"), dim("e", "turned"), dim("g", "heads")
    both = Dim.sum([n, e])
    q = b.input("q", t, g, both)
    latent = b.cache(b.input("c", t, r), "c")
    shared = b.cache(b.input("k", t, e), "k")
    own = b.contract(b.param("U", g, n, r), latent, over="r")
    repeated = b("expand", shared, type=b.type(q), name="v", dims=(g,))
    b.graph = _retyped(b.graph, repeated, (s, e, g))
    keys = b("concat", own, repeated, type=_type(s, g, both), dim=both)
    score = b.contract(b.cast(q), b.cast(keys), over="n|e", name="score")
    before = program(b.done(score), PUBLISHED | {"rank": 512})
    after = order.run(before)
    agree(before, after)
    assert limit(after) > 1
    assert not {"concat", "expand"} & {n.op for g in after.bodies.values() for n in g}


def _type(*dims: Dim):  # type: ignore[no-untyped-def]
    from compiler.ir import Type

    return Type("act", dims)


def _retyped(graph: Graph, name: str, dims: tuple[Dim, ...]) -> Graph:
    out = Graph(graph.name)
    for node in graph:
        out.add(node.with_(type=_type(*dims)) if node.name == name else node)
    return out


def test_a_product_whose_parts_are_no_factors_stays_one() -> None:
    """Gate and up projection in one let: taken apart, x would be read twice for nothing."""
    b = Body("M.call")
    f, u = dim("f", "rows"), dim("u", "rows")
    both = Dim.sum([f, u])
    let = b.contract(b.param("W", both, j), b.input("x", t, j), over="j", name="both")
    up = b("rename", b.part(let, both, "u"), type=_type(t, f), dim="u", to=f)
    graph = b.done(b.map("mul", b.map("sigmoid", b.part(let, both, "f")), up))
    after = order.run(program(graph, {"rows": 64, "columns": 64})).bodies["M.call"]
    assert products(after) == products(graph)


def test_two_attentions_of_one_body_have_a_branch_each() -> None:
    b = Body("M.call")
    g, n = dim("g", "heads"), dim("n", "width")
    x = b.input("x", t, g, n)
    for layer in "ab":
        c = b.cache(b.input(f"c{layer}", t, r), f"c{layer}")
        keys = b.contract(b.param(f"K{layer}", g, n, r), c, over="r")
        values = b.contract(b.param(f"V{layer}", g, n, r), c, over="r")
        p = b.softmax(b.contract(x, keys, over="n"))
        x = b.contract(p, values, over="s", name="x", rounds=True)
    before = program(b.done(x), {"heads": 128, "width": 128, "rank": 512})
    after = order.run(before)
    assert [branch.attrs["when"] for branch in branches(after)] == [("time", "<=", 163)] * 2
    assert len(after.bodies) == 5
    agree(before, after)


def test_scores_that_are_read_elsewhere_do_not_join_the_branch() -> None:
    """A region has one result: where scores are wanted too, each chain decides for itself."""
    b = Body("M.call")
    g, n = dim("g", "heads"), dim("n", "width")
    c = b.cache(b.input("c", t, r), "c")
    keys = b.contract(b.param("K", g, n, r), c, over="r")
    values = b.contract(b.param("V", g, n, r), c, over="r")
    score = b.contract(b.input("q", t, g, n), keys, over="n", name="score", rounds=True)
    out = b.contract(b.softmax(score), values, over="s")
    total = b.map("add", out, b.reduce("sum", score, "s"))
    before = program(b.done(total), {"heads": 128, "width": 128, "rank": 512})
    after = order.run(before)
    assert len(branches(after)) == 2
    agree(before, after)


def test_blocks_of_an_array_have_no_branch() -> None:
    """Their rows are not the step's positions, so nothing could be asked about these."""
    b = Body("M.call")
    x = b.input("x", dim("R"), j)
    y = b.contract(b.contract(b.param("A", i, r), b.param("B", r, j), over="r"), x, over="j")
    after = order.run(program(b.done(y), {"rows": 64, "columns": 64, "rank": 4}))
    assert not branches(after)
    assert products(after.bodies["M.call"])[0] == "act[R, r] = act[r, j] * act[R, j]"
