"""Tables move to the entry and are shared; masks, numbers and applied blocks stay."""

from collections import Counter
from dataclasses import replace

from lowered import Body, agree, dim, program, t

from compiler.ir import Child, Dim, Graph, Program
from compiler.passes import hoist

j, p, d = dim("j", "rope"), dim("p", "pairs"), dim("d", "hidden")
SIZES = {"rope": 8, "pairs": 4, "hidden": 16, "layers": 3}


def turned(b: Body, x: str) -> str:
    """x * cos(position * 1 / 2^p): as much of a rotary embedding as a test needs."""
    wave = b.map("pow", b.constant(2.0), b.iota(p), name="wave")
    table = b.map("cos", b.map("div", b.position(t), wave), name="c")
    return b.map("mul", x, table)


def attend() -> Graph:
    b = Body("Attend.call")
    x = b.input("x", t, p)
    total = b.map("add", turned(b, x), turned(b, b.map("neg", x)))
    return b.done(b.cast(total, "act"))


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.attrs.get("fn", node.op) for node in graph)


def model(attend: Graph) -> Program:
    """An entry that runs a loop over layers, each of which calls the block twice."""
    b = Body("Layer.call")
    x = b.input("x", t, p)
    x = b.call(attend, "attn", b.call(attend, "attn", x))
    layer = b.done(x)
    b = Body("M.call")
    x = b.input("x", t, p)
    index = Dim("a", dim("a", "layers").size)
    y = b("chain", x, type=b.type(x), name="y", body=layer.name, child="layers", index=index)
    made = program(b.done(y), SIZES, {"layers": layer, "attn": attend})
    modules = dict(made.modules)
    modules["M"] = replace(modules["M"], children=(Child("layers", "layers", index),))
    modules["layers"] = replace(modules["layers"], children=(Child("attn", "attn"),))
    return replace(made, modules=modules)


def test_a_table_is_computed_once_for_all_layers() -> None:
    before = model(attend())
    hoisted = hoist.run(before)
    agree(before, hoisted)
    attn, layer, main = (hoisted.bodies[n] for n in ("Attend.call", "Layer.call", "M.call"))
    assert ops(attn) == {"input": 2, "mul": 2, "neg": 1, "add": 1, "cast": 1}
    assert [node.attrs["name"] for node in attn.inputs] == ["x", "c"]
    assert ops(layer) == {"input": 2, "call": 2}
    assert ops(main)["cos"] == 1
    (chain,) = (node for node in main if node.op == "chain")
    assert [main[name].label for name in chain.inputs] == [None, "c"]


def test_what_no_step_changes_is_known_when_the_model_is_loaded() -> None:
    main = hoist.run(model(attend())).bodies["M.call"]
    known = {main[name].label or main[name].op for name in hoist.load_time(main)}
    assert known == {"wave", "constant", "iota"}


def test_a_dim_that_the_caller_uses_for_something_else_gets_another_name() -> None:
    inner = Body("Inner.call")
    x = inner.input("x", t, dim("q", "pairs"))
    wave = inner.map("pow", inner.constant(2.0), inner.iota(dim("q", "pairs")), name="wave")
    inner_graph = inner.done(inner.map("mul", x, inner.map("cos", wave)))
    outer = Body("M.call")
    other = outer.input("x", t, d)
    y = outer.call(inner_graph, "inner", outer.input("z", t, p), dims={"q": "p"})
    table = outer.contract(other, outer.param("q", d, dim("q", "hidden")), over="d")
    outer_graph = outer.done(outer.map("mul", y, outer.reduce("sum", table, "q")))
    before = program(outer_graph, SIZES, {"inner": inner_graph})
    after = hoist.run(before)
    agree(before, after)
    main = after.bodies["M.call"]
    (call,) = (node for node in main if node.op == "call")
    assert main[call.inputs[1]].type.names == ("p",)
    assert dict(call.attrs["dims"]) == {"q": "p"}


def test_masks_and_numbers_stay() -> None:
    s = dim("s")
    b = Body("Inner.call")
    x = b.input("x", t, s)
    mask = b.map("le", b.position(s), b.position(t))
    number = b.map("sqrt", b.constant(2.0))
    body = b.done(b.map("where", mask, b.map("mul", x, number), b.constant(0.0)))
    b = Body("M.call")
    y = b.call(body, "inner", b.input("x", t, s))
    before = program(b.done(y), SIZES, {"inner": body})
    assert [n.op for n in hoist.run(before).bodies["Inner.call"].inputs] == ["input"]


def test_bodies_that_become_identical_are_one() -> None:
    first = attend()
    second = Graph("Attend.call.1")
    for node in first:
        second.add(node)
    second.output = first.output
    b = Body("M.call")
    x = b.call(second, "b", b.call(first, "a", b.input("x", t, p)))
    made = program(b.done(x), SIZES, {"a": first, "b": second})
    hoisted = hoist.run(made)
    agree(made, hoisted)
    assert set(hoisted.bodies) == {"Attend.call", "M.call"}
    assert hoisted.modules["b"].methods == {"call": "Attend.call"}
