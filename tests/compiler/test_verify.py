"""Each broken rule is told with its body, its node, what was expected and found, and the line."""

from dataclasses import replace

import pytest
from decoder import decoder

from compiler.ir import Dim, Entry, EntryInput, Graph, Node, Type
from compiler.verify import VerifyError, problems, verify
from dsl.extents import Extent


def test_a_good_program_passes() -> None:
    verify(decoder())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # ops, operands, attributes
        ("= softmax(%seen)", "= smax(%seen)", "there is no op 'smax'"),
        ("gather(%embed, %token)", "gather(%embed)", "expected 2 operands, found 1"),
        ('cache(%kv) name="c"', "cache(%kv)", "attribute 'name' is missing: a name"),
        ('select(%pairs) dim="o" at=0', 'select(%pairs) dim="o" at=0.5',
         "attribute 'at': expected an int, found 0.5"),
        ('fn="tanh"', 'fn="tan"', "attribute 'fn': expected one of abs, add,"),
        ('fn="tanh"', 'fn="tanh" fast=true', "map has no attribute 'fast'"),
        ('body="Ffn.call"', 'body="Ffn.cal"', "there is no body 'Ffn.cal'"),
        # types
        ('over=("n") : f32[h, t, s]', 'over=("n") : act[h, t, s]',
         "expected f32[t, h, s] by the rule of contract, found act[h, t, s]"),
        ('over=("n") : f32[h, t, s]', 'over=("n") : f32[t, s]', "found f32[t, s]"),
        ('over=("f") : act[b, d]', 'over=("x") : act[b, d]', "no operand has the summed dims x"),
        ("act[t, h, p]", "act[t, p, p]", "dim p occurs 2 times"),
        ("to=`x`", "to=`w`", "d: hidden cannot be called w: vocab"),
        ('part="j" : act[t, h, j]', 'part="i" : act[t, h, j]', "is not a sum with one part 'i'"),
        ("into=(`p`, `o`)", "into=(`p`, `n`)", "does not fall into width^2 / 2 elements"),
        ("at=1", "at=2", "o: 2 has no position 2"),
        ('dims=("p", "o")', 'dims=("p")', "do not make j: width"),
        ("stack(%l, %r)", "stack(%l)", "1 values do not make o: 2"),
        ("i64[t, k] of e", "i64[t, k] of k", "expected i64[t, k] of e by the rule of argtop"),
        ("%next = input name=\"next\" : i64[t] of w", "%next = input name=\"next\" : i64[t]",
         "the index is not typed: it may not index w"),
        ("map(%mask, %score, %inf)", "map(%score, %score, %inf)", "where chooses by a bool value"),
        ("%past = position : i64[s]", "%past = position : i64[d]", "not ['plain']"),
        # modules, parameters, children
        ('param="W_up"', 'param="W_in"', "module Ffn has no parameter 'W_in'"),
        ('state param="bias"', 'param param="bias"', "'bias' is a state, not a param"),
        ("param W_up : act[f, d]", "param W_up : act[d, f]", ""),  # the order is the type's affair
        ("param W_up : act[f, d]", "param W_up : f32[f, d]", "expected f32[f, d] by the rule of"),
        ('child="ffn"', 'child="fnn"', "module Sparse has no child 'fnn'"),
        ("child ffn[e]", "child ffn", "child 'ffn' of Sparse is not an array over e"),
        ("child layers[z] = Sparse", "child layers[z] = Spare", "there is no module 'Spare'"),
        ("child layers[a] = Dense", "child layers = Dense", "'layers' is both one and several"),
        ("dim a = dense\n", "dim a = dense + 1\n",
         "expected a piece from dense + 1, found one from dense"),
        ("name embed", "name embeds", "a checkpoint name is given for 'embeds'"),
        ("dim h = heads", "dim h = head", "there is no constant 'head'"),
        ("const width = 16", "const width = 15", "width / 2 is 15/2, not a whole number"),
        # bodies
        ("call(%x) body=\"Attention.call\"", "call(%x, %x) body=\"Attention.call\"",
         "Attention.call takes 1 values, not 2"),
        ('index=`z`', 'index=`d`', "child 'layers' of Model is not an array over d: hidden"),
        ('as x1 rounds', 'as x0 rounds', "label 'x0' is %x0's already"),
        ("entry main = Model.main(token)", "entry main = Model.main(tokens)",
         "expected inputs ['token'] of Model.main, found ['tokens']"),
        ("next = token + 1", "next = past + 1", "there is no input 'past'"),
        ("method main = Model.main", "method main = Model.man", "there is no body 'Model.man'"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_told(old: str, new: str, message: str) -> None:
    found = problems(decoder((old, new)))
    if not message:
        assert not found
        return
    assert any(message in str(p) for p in found), [str(p) for p in found]


def test_the_message_names_the_line_and_shows_the_node() -> None:
    program = decoder(('over=("d") : act[t, h, n|j]', 'over=("h") : act[t, h, n|j]'))
    with pytest.raises(VerifyError) as error:
        verify(program, after="order")
    message = str(error.value)
    assert message.startswith("the program is not well-formed after order:\n")
    assert "toy.arch:30: Attention.call: expected act[n|j, d, t] by the rule of contract" in message
    assert '%q = contract(%1, %x) over=("h") : act[t, h, n|j] as q rounds' in message


def test_a_loop_keeps_its_type() -> None:
    old = '%y = map(%x, %h) fn="add" : act[t, d] as y rounds\n  return %y\n}\n\nbody Attention'
    assert "Dense.call takes act[t, d] and gives f32[t, d]: a chain keeps its type" in str(
        problems(
            decoder(
                (old, old.replace("return %y", "%z = cast(%y) : f32[t, d]\n  return %z")),
            )
        )[0]
    )


def test_a_body_must_not_run_itself() -> None:
    program = decoder(
        ('call(%x) body="Attention.call" child="attn" dims=(("t", "t"), ("d", "d"))',
         'call(%x) body="Dense.call" child="" dims=()'),
    )  # fmt: skip
    assert "the body runs itself: Dense.call -> Dense.call" in str(problems(program)[0])


def test_a_dim_means_one_thing_in_a_body() -> None:
    program = decoder(
        ("into=`j` : f32[t, h, j]", "into=`j#2` : f32[t, h, `j#2`]"),
        ("  dim o = 2\n", '  dim o = 2\n  dim `j#2` = 2 * heads named "j"\n'),
    )
    assert any("dim j is j: width and j: 2 * heads" in str(p) for p in problems(program))


def test_graphs_built_by_hand_are_checked_too() -> None:
    program = decoder()
    graph = Graph("Model.main")
    dim = Dim("t", Extent.name("time"), "time")
    graph.add(Node("x", "input", (), Type("i64", (dim,)), {"name": "token"}))
    graph._nodes["y"] = Node("y", "map", ("z",), Type("i64", (dim,)), {"fn": "neg"})
    graph.nx.add_node("y")
    graph.output = "w"
    told = [str(p) for p in problems(program.with_bodies({**program.bodies, "Model.main": graph}))]
    assert any("the output %w is not defined" in t for t in told)
    assert any("%z is read before it is defined" in t for t in told)
    assert any("expected the edges [(0, 'z')], found []" in t for t in told)


def test_entries_name_their_body() -> None:
    program = decoder()
    entry = Entry("main", "Model.man", (EntryInput("token"),))
    found = problems(replace(program, entries={"main": entry}))
    assert "entry main: there is no body 'Model.man'" in str(found[0])
