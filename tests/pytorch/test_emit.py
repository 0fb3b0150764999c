"""Every op of the IR, emitted, against the reference interpreter: packed ragged batches, cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from compiler.ir import Child, Dim, Entry, EntryInput, Graph, Module, Program, Type
from compiler.rules import FUNCTIONS, UNARY
from dsl.extents import Extent
from tests.compiler.lowered import Body, dim, parameters, program, s, t
from tests.pytorch.running import Both

SIZES = {"hidden": 5, "wide": 3, "tall": 7, "many": 6, "few": 2}
d, c, e = dim("d", "hidden"), dim("c", "wide"), dim("e", "tall")
g, m, k = dim("g", "many"), dim("m", "few"), dim("k", "few")

# Ragged chunks, one token each, a batch of one; sequences that sit a step out come separately.
CHUNKS = ([5, 3, 4], [1, 4, 2], [1, 1, 1])


def agree(b: Body, output: str, *chunks: list[int]) -> None:
    both = Both(program(b.done(output), SIZES))
    for cached in (True, False):
        both.check("main", *(chunks or CHUNKS)[: None if cached else 1], cached=cached)
    both.check("main", [1])


def start(name: str = "M.call") -> tuple[Body, str]:
    b = Body(name)
    return b, b.input("x", t, d)


def history(b: Body, x: str) -> str:
    """act[s, d]: x, remembered."""
    return b.cache(x, "past")


def sized(b: Body, op: str, a: str, *dims: Dim, dtype: str | None = None, **attrs: Any) -> str:
    of = attrs.pop("of", None)
    made = Type(dtype or b.type(a).dtype, dims, of)  # type: ignore[arg-type]
    return b(op, a, type=made, **attrs)


# -- arithmetic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", sorted(FUNCTIONS - {"where", "and", "or", "not"}))
@pytest.mark.parametrize("other", ["value", "parameter", "whole", "number"])
def test_map(fn: str, other: str) -> None:
    b, x = start()
    x = b.map("abs", x)  # log, sqrt and powers are of positive numbers
    if fn in UNARY:
        whole = b.map("add", b.position(t), b.constant(1))
        y = b.map(fn, whole if other == "whole" else x)
        if other == "whole" and b.type(y).dtype == "i64":
            y = b.cast(y, "act")
        return agree(b, b.map("mul", y, b.param("w", d)))
    right = {
        "value": lambda: b.map("abs", b.param("w", d)),
        "parameter": lambda: b.map("abs", b.param("v", c, d)),
        "whole": lambda: b.map("add", b.position(t), b.constant(1)),
        "number": lambda: b.constant(2),
    }[other]()
    result = b.map(fn, x, right)
    back = b.map(fn, right, x)
    return agree(b, b.map("add", b.cast(result), b.cast(back)))


def test_logic_and_where() -> None:
    b, x = start()
    up = b.map("gt", x, b.constant(0.0))
    near = b.map("le", b.position(t), b.constant(2))
    either = b.map("or", b.map("and", up, near), b.map("not", b.map("lt", x, b.constant(-1.0))))
    y = b.map("where", either, x, b.constant(0.5))
    z = b.map("where", near, b.constant(1.0), b.constant(0.0))
    agree(b, b.map("add", y, z))


def test_numbers_alone_are_computed_while_compiling() -> None:
    b, x = start()
    one = b.map("add", b.constant(0.25), b.map("exp", b.constant(0)))
    agree(b, b.map("mul", x, b.map("pow", one, b.constant(2.0))))


@pytest.mark.parametrize("fn", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("over", ["d", "s", "t", "s d"])
def test_reduce(fn: str, over: str) -> None:
    b, x = start()
    y = history(b, x) if "s" in over else x
    dims = tuple(i for i in b.type(y).dims if i.name not in over.split())
    y = b("reduce", y, type=Type("act", dims), fn=fn, over=tuple(over.split()))
    agree(b, b.map("add", x, y))


@pytest.mark.parametrize("over", ["d", "s", "t"])
def test_softmax(over: str) -> None:
    b, x = start()
    y = b.contract(x, history(b, x), over="d") if over == "s" else x  # [t, s]
    seen = b.map("gt", y, b.constant(0.1))  # some rows see nothing
    y = b.softmax(b.map("where", seen, y, b.constant(float("-inf"))), over)
    if over == "s":
        y = b.contract(y, history(b, x), over="s")
    agree(b, b.map("add", y, x))


def contractions() -> dict[str, Callable[[Body, str], str]]:
    def stored(b: Body, x: str) -> str:
        return b.contract(b.param("W", c, d), x, over="d")

    def transposed(b: Body, x: str) -> str:
        return b.contract(b.param("W", d, c), x, over="d")

    def product_rows(b: Body, x: str) -> str:
        rows = Dim.product([c, Dim.sum([g, m])])
        w = b.unflatten(b.param("W", rows, d), rows, *rows.parts)
        y = b.contract(w, x, over="d")
        return b.contract(y, b.part(w, rows.parts[1], "g"), b.part(y, rows.parts[1], "m"), over="c")

    def product_columns(b: Body, x: str) -> str:
        columns = Dim.product([c, d])
        w = b.unflatten(b.param("W", e, columns), columns, c, d)
        y = b.map("mul", x, b.param("v", c))
        return b.contract(w, y, over="c d")

    def summand(b: Body, x: str) -> str:
        rows = Dim.sum([c, e])
        w = b.param("W", rows, d)
        return b.contract(
            b.part(w, rows, "e"), b.contract(b.part(w, rows, "c"), x, over="d"), over="d"
        )

    def three(b: Body, x: str) -> str:
        return b.contract(x, b.param("v", d, c), b.param("u", c, d, e), over="d c")

    def squared(b: Body, x: str) -> str:
        return b.contract(x, x, over="d")

    def alone(b: Body, x: str) -> str:
        return b.contract(x, over="d")

    def outer(b: Body, x: str) -> str:
        return b.contract(x, b.param("v", c), b.constant(0.5), over="")

    def per_sequence(b: Body, x: str) -> str:
        total = b.contract(x, x, over="t")  # [d], one per sequence
        return b.contract(b.param("W", c, d), b.map("mul", total, x), over="d")

    def over_history(b: Body, x: str) -> str:
        past = history(b, x)
        return b.contract(b.contract(x, past, over="d"), b.map("exp", past), over="s")

    def mixed(b: Body, x: str) -> str:
        return b.contract(b.cast(x), b.param("W", c, d), over="d")

    return {f.__name__: f for f in (stored, transposed, product_rows, product_columns, summand,
            three, squared, alone, outer, per_sequence, over_history, mixed)}  # fmt: skip


@pytest.mark.parametrize("name", contractions())
def test_contract(name: str) -> None:
    b, x = start()
    agree(b, contractions()[name](b, x))


# -- choosing --------------------------------------------------------------------------------------


def test_top_and_its_kin_prefer_the_lowest_index() -> None:
    b, x = start()
    ties = b.map("floor", x)
    best = sized(b, "top", ties, t, k, over="d", to="k")
    pick = sized(b, "argtop", ties, t, k, dtype="i64", of=d, over="d", to="k")
    among = sized(b, "in_top", ties, t, d, dtype="bool", over="d", count=Extent.name("few"))
    weight = b("gather", x, pick, type=Type("act", (t, k)), dim="d")
    kept = b.map("where", among, x, b.constant(0.0))
    y = b.contract(best, weight, over="k")
    agree(b, b.map("add", kept, y))


def test_picks_over_the_history() -> None:
    b, x = start()
    past = history(b, x)
    score = b.contract(x, past, over="d")
    least = b.map("neg", b.map("abs", score))
    one = Dim("k", Extent.of(1))
    pick = sized(b, "argtop", least, t, one, dtype="i64", of=s, over="s", to="k")
    chosen = b("gather", past, pick, type=Type("act", (t, one, d)), dim="s")
    agree(b, b.contract(x, chosen, over="k"))


def test_in_the_top_of_the_history() -> None:
    """Shorter ones than are wanted are in it as a whole, but for what is -inf."""
    b, x = start()
    score = b.contract(x, history(b, x), over="d")
    seen = b.map("le", b.position(s), b.position(t))
    past = b.map("where", seen, score, b.constant(float("-inf")))
    among = sized(b, "in_top", past, t, s, dtype="bool", over="s", count=Extent.name("wide"))
    kept = b.map("where", among, score, b.constant(0.0))
    agree(b, b("reduce", kept, type=Type("act", (t,)), fn="sum", over=("s",)))


def gathers() -> dict[str, Callable[[Body, str, str], str]]:
    def rows(b: Body, x: str, pick: str) -> str:
        return b("gather", b.param("W", d, c), pick, type=Type("act", (t, k, c)), dim="d")

    def columns(b: Body, x: str, pick: str) -> str:
        return b("gather", b.param("W", c, d, e), pick, type=Type("act", (t, c, k, e)), dim="d")

    def aligned(b: Body, x: str, pick: str) -> str:
        table = b.map("mul", x, b.param("W", c, d))  # [t, c, d]
        return b("gather", table, pick, type=Type("act", (t, c, k)), dim="d")

    return {"rows": rows, "columns": columns, "aligned": aligned}


@pytest.mark.parametrize("name", gathers())
def test_gather(name: str) -> None:
    b, x = start()
    pick = sized(b, "argtop", x, t, k, dtype="i64", of=d, over="d", to="k")
    agree(b, gathers()[name](b, x, pick))


# -- views, joining --------------------------------------------------------------------------------


def test_views_and_joining() -> None:
    b, x = start()
    cd, cm = Dim.product([c, d]), Dim.sum([c, m])
    wide = b.map("mul", x, b.param("v", c))  # [t, d, c]
    flat = sized(b, "flatten", wide, t, cd, dims=("c", "d"), into=cd)
    again = b.unflatten(flat, cd, c, d)
    row = sized(b, "select", again, t, d, dim="c", at=1)
    other = Dim("f", d.size)
    named = sized(b, "rename", row, t, other, dim="d", to=other)
    spread = sized(b, "expand", named, other, m, t, dims=(m,))
    first = sized(b, "select", again, t, c, dim="d", at=0)
    second = sized(b, "select", spread, m, t, dim="f", at=2)
    joined = b("concat", first, second, type=Type("act", (cm, t)), dim=cm)
    two = Dim("i", Extent.of(2))
    both = b("stack", joined, joined, type=Type("act", (t, two, cm)), dim=two)
    agree(b, b.part(both, cm, "m"))


@pytest.mark.parametrize("along", ["d", "t", "s"])
def test_expand(along: str) -> None:
    b, x = start()
    to = {"d": dim("f", "few"), "t": t, "s": s}[along]
    plain = b.param("v", c)
    if along == "s":
        spread = sized(b, "expand", x, t, s, d, dims=(s,))
        return agree(b, b.reduce("mean", spread, "s"))
    spread = sized(b, "expand", plain, to, c, dims=(to,))
    return agree(b, b.map("mul", x, spread))


@pytest.mark.parametrize("along", ["d", "t", "s"])
def test_iota(along: str) -> None:
    b, x = start()
    numbers = b.iota({"d": d, "t": t, "s": s}[along])
    if along == "s":
        numbers = b.reduce("max", b.map("mul", numbers, history(b, x)), "s")
    agree(b, b.map("add", x, numbers))


def test_cache_keeps_the_order_of_its_dims() -> None:
    b, x = start()
    wide = b("map", x, b.param("v", c), type=Type("act", (c, t, d)), fn="mul")
    past = b.cache(wide, "past")  # [c, s, d]
    assert b.type(past).names == ("c", "s", "d")
    score = b.contract(x, past, over="d")
    agree(b, b.contract(b.softmax(score), past, over="s"))


def test_select_rows() -> None:
    b, x = start()
    row = Dim("row", Extent.name("wanted"), "rows")
    y = sized(b, "select_rows", x, row, d)
    agree(b, b.contract(b.param("W", c, d), y, over="d"))


# -- other bodies ----------------------------------------------------------------------------------


def test_a_child_takes_values_per_sequence_and_along_history() -> None:
    inner = Body("Inner.call")
    total, past = inner.input("total", d), inner.input("past", s, d)
    y = inner.map("add", total, inner.reduce("mean", past, "s"))
    child = inner.done(inner.map("mul", y, inner.param("v", d)))
    b, x = start()
    y = b.call(child, "inner", b.reduce("sum", x, "t"), history(b, x))
    both = Both(program(b.done(b.map("add", x, y)), SIZES, {"inner": child}))
    both.check("main", *CHUNKS)


def block(name: str, *inputs: Dim | None) -> Graph:
    """A block whose arguments have a row dim, but for those given as None."""
    R = Dim("R", Extent.name("rows"), "rows")
    b = Body(f"{name}.call")
    given = [b.input(f"x{i}", *([R] if a else []), d) for i, a in enumerate(inputs)]
    y = b.contract(b.param("W", d, e), b.contract(b.param("U", e, d), given[0], over="d"), over="e")
    for other in given[1:]:
        y = b.map("mul", y, other)
    return b.done(y)


def routed(first: int, inputs: tuple[Dim | None, ...]) -> Program:
    """Tokens through the two blocks of seven that they pick, whose numbers begin at ``first``."""
    child = block("Block", *inputs)
    over = Dim("e", Extent.of(7), start=Extent.of(first))
    b, x = start()
    score = b.contract(b.param("C", over, d), x, over="d")
    pick = sized(b, "argtop", score, t, k, dtype="i64", of=over, over="e", to="k")
    args = [x]
    if None in inputs:
        args.append(b.param("v", d))
    elif len(inputs) > 1:
        args.append(b.map("exp", sized(b, "expand", x, t, k, d, dims=(k,))))
    y = b("apply", pick, *args, type=Type("act", (t, k, d)), body=child.name, child="block",
          over="e", rows=("t", "k"), dims=())  # fmt: skip
    made = program(b.done(b.contract(y, over="k")), SIZES)
    modules = dict(made.modules)
    array = (Child("block", "Block", over),)
    modules["M"] = replace(modules["M"], children=array)
    modules["Block"] = Module("Block", "Block", parameters(child), methods={"call": child.name})
    return replace(made, modules=modules, bodies={**made.bodies, child.name: child})


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("inputs", [(t,), (t, t), (t, None)])
def test_apply(first: int, inputs: tuple[Dim | None, ...]) -> None:
    both = Both(routed(first, inputs))
    both.check("main", *CHUNKS)
    both.check("main", [1])


def looped(first: int) -> Program:
    """A loop over an array in two pieces, the first of which may be empty or begin late."""
    one, two = block("One", t), block("Two", t)
    one, two = (_over_time(graph) for graph in (one, two))
    a = Dim("a", Extent.of(2), start=Extent.of(first))
    z = Dim("z", Extent.of(3), start=Extent.of(first + 2))
    b, x = start()
    for index, graph in ((a, one), (z, two)):
        x = b("chain", x, type=Type("act", (t, d)), body=graph.name, child="layers", index=index)
    made = program(b.done(x), SIZES)
    modules = dict(made.modules)
    layers = (Child("layers", "One", a), Child("layers", "Two", z))
    modules["M"] = replace(modules["M"], children=layers)
    for graph in (one, two):
        name = graph.name.split(".")[0]
        modules[name] = Module(name, name, parameters(graph), methods={"call": graph.name})
    return replace(made, modules=modules, bodies={**made.bodies, one.name: one, two.name: two})


def _over_time(graph: Graph) -> Graph:
    out = Graph(graph.name)
    for node in graph:
        dims = tuple(t if i.kind == "rows" else i for i in node.type.dims)
        out.add(replace(node, type=replace(node.type, dims=dims)))
    out.output = graph.output
    return out


@pytest.mark.parametrize("first", [0, 2])
def test_chain(first: int) -> None:
    Both(looped(first)).check("main", *CHUNKS)


@pytest.mark.parametrize("relation", ["<=", "<", ">", ">="])
@pytest.mark.parametrize("last", [True, False])
def test_branch(relation: str, last: bool) -> None:
    sides = []
    for name in ("few", "many"):
        side = Body(f"M.call.{name}")
        y, past = side.input("x", t, d), side.input("past", s, d)
        score = side.softmax(side.contract(y, past, over="d"))
        if name == "few":
            y = side.contract(score, past, over="s")
        else:
            y = side.contract(past, score, over="s")
        sides.append(side.done(y))
    b, x = start()
    y = b("branch", x, history(b, x), type=Type("act", (t, d)), when=("time", relation, 2),
          then="M.call.few", otherwise="M.call.many")  # fmt: skip
    y = y if last else b.map("add", x, y)
    made = program(b.done(y), SIZES)
    both = Both(replace(made, bodies={**made.bodies, **{g.name: g for g in sides}}))
    both.check("main", *CHUNKS)


def test_another_def_of_the_same_block() -> None:
    inner = Body("M.inner")
    graph = inner.done(inner.map("mul", inner.input("x", t, d), inner.param("v", d)))
    b, x = start()
    y = b.call(graph, "", b.map("exp", x))
    made = program(b.done(b.map("add", x, y)), SIZES)
    root = made.modules["M"]
    root = replace(
        root,
        parameters=parameters(graph),
        methods={"call": "M.call", "inner": graph.name},
    )
    made = replace(made, modules={"M": root}, bodies={**made.bodies, graph.name: graph})
    Both(made).check("main", *CHUNKS)


def test_two_entries() -> None:
    b, x = start("M.main")
    main = b.done(b.map("mul", x, b.param("v", d)))
    b = Body("M.after")
    x, y = b.input("x", t, d), b.input("next", t, d)
    after = b.done(b.map("add", x, b.map("mul", y, b.param("v", d))))
    made = program(main, SIZES)
    root = replace(made.modules["M"], methods={"main": main.name, "after": after.name})
    entry = Entry("after", after.name, (EntryInput("x"), EntryInput("next", "x", 1)))
    made = replace(
        made,
        modules={"M": root},
        bodies={**made.bodies, after.name: after},
        entries={**made.entries, "after": entry},
    )
    both = Both(made)
    both.check("main", *CHUNKS)
    both.check("after", *CHUNKS)
