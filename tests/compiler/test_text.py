"""Text and structure are the same thing: printing and parsing are inverse."""

import math
from dataclasses import replace
from typing import Any

import pytest
from decoder import TEXT, decoder
from hypothesis import given, note, settings
from hypothesis import strategies as st

from compiler.ir import (
    Child,
    Dim,
    Entry,
    EntryInput,
    Graph,
    Module,
    NamePart,
    Node,
    Parameter,
    Program,
    Type,
)
from compiler.text import TextError, node_text, parse, program_text, same
from dsl.diagnostics import Source, Span
from dsl.extents import Extent


def test_text_to_program_and_back() -> None:
    assert program_text(parse(TEXT)) == TEXT


def test_the_number_of_layers_is_one_line() -> None:
    program = decoder()
    more = replace(program, constants={**program.constants, "layers": 610})
    changed = set(program_text(program).split("\n")) ^ set(program_text(more).split("\n"))
    assert changed == {"const layers = 10", "const layers = 610"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("const a = ?", "line 2: cannot read '?'"),
        ("%x = neg", "line 2: '%' begins nothing"),
        ("const a = b", "line 2: 'b' is not a value"),
        ("body B {", "line 2: the closing brace is missing"),
        ("body B {\n%x = input : act[t]\n}", "line 3: dim 't' is not declared"),
        ("body B {\n%x = input : half[]\n}", "line 3: 'half' is not a dtype"),
        ("body B {\n%x = neg(%y) : act[]\n}", "line 3: B: %x reads %y before it is defined"),
        ("body B {\nreturn %y\n}", "line 3: %y is not defined"),
        ("body B {\ndim t [tim] = time\n}", "line 3: 'tim' is not a kind of dim"),
        ("body B {\ndim t = 3 4\n}", "line 3: '4' is too much"),
        ("module M of M {\nparm x : act[]\n}", "line 3: 'parm' is not a part of a module"),
        ("entry e = B(x", "line 2: expected ',' and found 'the end'"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(line: str, message: str) -> None:
    with pytest.raises(TextError) as error:
        parse(f"program p of M\n{line}")
    assert str(error.value).startswith(message)


def test_a_node_reads_like_a_line_of_source() -> None:
    graph = decoder().bodies["Attention.call"]
    assert node_text(graph["q"]) == (
        '%q = contract(%1, %x) over=("d") : act[t, h, n|j] as q rounds  // toy.arch:30'
    )


# -- any program -----------------------------------------------------------------------------------

names = st.from_regex(r"[a-z][a-z0-9_]{0,4}", fullmatch=True)
odd_names = names | st.sampled_from(
    ["1", "1.1", "1.1.2", "3e5", "inf", "true", "a b", 'q"', "é", "a-1"]
)
spans = st.none() | st.builds(
    lambda file, line: Span(Source(file, ""), line, 1, line, 1),
    st.sampled_from(["a.arch", "dsl/std/x.arch"]),
    st.integers(1, 999),
)
numbers = st.integers() | st.floats(allow_nan=False) | st.booleans()


def arithmetic(parts: tuple[str, Extent, Extent]) -> Extent:
    sign, left, right = parts
    if sign == "/":
        return left / right if len(right.terms) == 1 else left
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


extents = st.recursive(
    st.builds(Extent.name, names) | st.integers(1, 9).map(Extent.of),
    lambda inner: st.tuples(st.sampled_from("+-*/"), inner, inner).map(arithmetic),
    max_leaves=4,
)
atoms = st.builds(
    Dim, names, extents, st.sampled_from(["plain", "time", "history", "rows"]), start=extents
)
dims = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(Dim.sum)
        | st.lists(inner, min_size=1, max_size=3).map(Dim.product)
        | st.builds(
            lambda name, parts: replace(Dim.product(parts), name=name),
            names | st.just("odd, name"),
            st.lists(inner, min_size=1, max_size=2),
        )
    ),
    max_leaves=4,
)
types = st.builds(
    Type,
    st.sampled_from(["act", "f32", "i64", "bool"]),
    st.lists(dims, max_size=3).map(tuple),
    st.none() | dims,
)
values = st.recursive(
    st.none() | numbers | st.text(max_size=6) | dims | extents,
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)

name_parts = st.builds(NamePart, st.text(max_size=6), st.none() | odd_names, spans)


@st.composite
def graphs(draw: st.DrawFn, name: str) -> Graph:
    graph = Graph(name)
    for node in draw(st.lists(odd_names, min_size=1, max_size=5, unique=True)):
        known = [n.name for n in graph]
        operands = draw(st.lists(st.sampled_from(known), max_size=3)) if known else []
        graph.add(
            Node(
                node,
                draw(names),
                tuple(operands),
                draw(types),
                draw(st.dictionaries(names, values, max_size=3)),
                draw(spans),
                draw(st.none() | odd_names),
                draw(st.booleans()),
            )
        )
        graph.output = node
    return graph


@st.composite
def programs(draw: st.DrawFn) -> Program:
    roles: Any = st.sampled_from(["param", "state"])
    modules = {
        name: Module(
            name,
            draw(names),
            tuple(draw(st.lists(st.builds(Parameter, names, types, roles, spans), max_size=2))),
            tuple(draw(st.lists(st.builds(Child, names, names, st.none() | dims), max_size=2))),
            draw(st.dictionaries(names, name_parts, max_size=2)),
            draw(st.dictionaries(names, odd_names, max_size=2)),
            draw(spans),
        )
        for name in draw(st.lists(odd_names, max_size=2, unique=True))
    }
    inputs = st.builds(EntryInput, names) | st.builds(EntryInput, names, names, st.integers(-3, 3))
    entries = {
        name: Entry(name, draw(odd_names), tuple(draw(st.lists(inputs, max_size=2))))
        for name in draw(st.lists(names, max_size=2, unique=True))
    }
    bodies = draw(st.lists(odd_names, max_size=2, unique=True))
    constants = st.dictionaries(names, numbers | st.none() | st.text(max_size=5), max_size=3)
    return Program(
        draw(odd_names),
        draw(constants),
        draw(odd_names),
        modules,
        {name: draw(graphs(name)) for name in bodies},
        entries,
        tuple(draw(st.lists(st.text(max_size=5), max_size=2))),
    )


@settings(max_examples=40)
@given(programs())
def test_any_program_survives(program: Program) -> None:
    text = program_text(program)
    note(text)
    again = parse(text)
    assert same(program, again)
    assert program_text(again) == text


def test_numbers_keep_their_kind() -> None:
    for value in (1, 1.0, True, False, -3, 1e-20, math.inf, -math.inf, 10**30, None, "1"):
        program = replace(decoder(), constants={"x": value})
        again = parse(program_text(program)).constants["x"]
        assert again == value
        assert type(again) is type(value)
