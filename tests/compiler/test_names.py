"""Names of tensors that are computed from the numbers of arrays."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.clashes import check_names
from compiler.manifest import ParameterRow
from compiler.passes.elaborate import run as elaborate
from compiler.report import report
from compiler.tensors import BadName, NameClash, Pattern, patterns, tensors
from compiler.text import parse, program_text, same
from dsl.clashes import Named
from dsl.constants import Choices
from dsl.diagnostics import DiagnosticError
from dsl.program import open_program
from dsl.templates import TemplateError, filled, parts

TURN = """\
import std.norm
const layers = 5
const turns = floor(layers / 2)
index t : time
block Layer[d] {
  use norm = RMSNorm[d]
  def (x[t,d]) -> y[t,d] { y[t,d] = x[t,d] + norm(x[t,d]) }
}
block Turn[d] {
  use near = Layer[d], far = Layer[d]
  def (x[t,d]) -> y[t,d] { y[t,d] = far(near(x[t,d])) }
}
model Hybrid {
  index d : 8, w : 20, i : turns, z : 2 * turns .. layers
  param embed[w, d]
  use turn[i] = Turn[d], tail[z] = Layer[d]
  def main(token[t] of w) -> logits[t,w] {
    x[t,d] = chain[i](turn, embed[token[t], d])
    logits[t,w] = embed[w,d] * chain[z](tail, x[t,d])
  }
}
names RMSNorm { gain = "weight" }
names Layer { norm = "input_layernorm" }
names Turn { near = "model.layers.{2*n}", far = "model.layers.{2*n + 1}" }
names Hybrid { turn[n] = "", tail[z] = "model.layers.{layers - 1}" }
"""


def program(tmp_path: Path, layers: int = 5, *changes: tuple[str, str]):
    text = TURN
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "turn.arch").write_text(text)
    return elaborate(open_program(str(tmp_path / "turn.arch"), Choices(set={"layers": layers})))


@pytest.mark.parametrize("layers", [1, 2, 4, 5])
def test_layers_in_turn_have_the_numbers_of_a_checkpoint(tmp_path, layers):
    named = {t.path: t.name for t in tensors(program(tmp_path, layers))}
    expected = {f"model.layers.{k}.input_layernorm.weight" for k in range(layers)} | {"embed"}
    assert set(named.values()) == expected
    for path, name in named.items():
        if path.startswith("turn"):
            turn, kind = path.removeprefix("turn[").split("]")
            assert name.split(".")[2] == str(2 * int(turn) + (".far" in kind))


@pytest.mark.parametrize("layers", [61, 610, 100_001])
def test_there_is_one_row_for_each_kind_however_many_layers(tmp_path, layers):
    made = program(tmp_path, layers)
    names = [p.name for p in patterns(made)]
    assert len(names) == (3 if layers % 2 == 0 else 4)
    assert names[1:3] == [
        f"model.layers.{{2 * $0{x}}}.input_layernorm.weight" for x in ("", " + 1")
    ]
    assert len(program_text(made)) < 5_000
    assert same(parse(program_text(made)), made)
    rows = [ParameterRow.of(p) for p in patterns(made)]
    assert [ParameterRow.model_validate_json(r.model_dump_json()).pattern() for r in rows] == (
        patterns(made)
    )


def test_one_block_of_an_array_is_shown_by_its_number(tmp_path):
    paths = [row.path for row in report(program(tmp_path)).blocks]
    assert "tail[4]" in paths and "turn[0..2].near" in paths


def test_the_number_of_a_nearer_array_goes_first_and_then_constants():
    assert filled("{layers}.{i}.{i*2}", {"i": 1}, {"i": 7, "layers": 3}) == "3.{1}.{2 * $1}"
    assert filled("{kind}.{2 * n / 3 + n / 3}", {"n": 0}, {"kind": "a"}) == "a.{0}"
    assert filled("{(layers - 1) * -(2 - 4) / 2}", {}, {"layers": 61}) == "60"


@pytest.mark.parametrize(
    "text",
    [
        "{}", "{2*}", "{(i}", "{i", "i}", "{{i}}", "{2i}", "{i ^ 2}", "{1.5 * i}", "{i i}",
        "{i.__class__}", "{0!r}", "{" + "(" * 50_000 + "i" + ")" * 50_000 + "}",
    ],
)  # fmt: skip
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(TemplateError):
        parts(text)


@pytest.mark.parametrize(
    "text", ["{2 * $1}", "{1}", "{i}", "{0.real}", "{$0 / 2}", "{$0 - 1}", "{"]
)
def test_a_manifest_with_such_a_name_is_refused(text):
    row = {
        "path": "a[{0}]", "tensor": text, "ranges": [[0, 4]], "dims": [], "shape": [],
        "format": "act", "role": "param", "initial": "gain", "entries": [],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"name|array|expression"):
        ParameterRow.model_validate_json(json.dumps(row))


def test_two_layers_of_one_name_are_refused_with_the_lines_that_say_so(tmp_path):
    """By the checker; and by the compiler, where a program comes from elsewhere."""
    with pytest.raises(DiagnosticError) as caught:
        program(tmp_path, 5, ("{layers - 1}", "{layers - 2}"))
    (told,) = caught.value.diagnostics
    same = (
        "turn[0..2].far.norm.gain and tail[4].norm.gain have one name in a checkpoint: "
        "model.layers.3.input_layernorm.weight"
    )
    assert (told.code, told.message, told.span.line) == ("E0703", same, 25)
    text = program_text(program(tmp_path)).replace("{layers - 1}", "{layers - 2}")
    with pytest.raises(NameClash) as refused:
        patterns(parse(text))
    message = str(refused.value)
    assert message.startswith(f"{same} (named at ")
    assert message.count("turn.arch:") == 4


def test_a_number_that_no_array_has_is_refused_where_a_program_is_read(tmp_path):
    text = program_text(program(tmp_path)).replace("{2*n}", "{2*m}")
    with pytest.raises(BadName, match=r"'near' .*turn.arch:24\): 'm' is neither"):
        patterns(parse(text))


# -- decided on ranges, as if every name were compared --------------------------------------------


sums = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=3)
names = st.lists(
    st.tuples(st.integers(0, 4), sums).map(
        lambda s: "{" + " + ".join([str(s[0]), *(f"{k} * ${slot}" for slot, k in s[1])]) + "}"
    )
    | st.integers(0, 9).map(str),
    min_size=1, max_size=2,
).map(".".join)  # fmt: skip
ranges = st.tuples(st.integers(0, 3), st.integers(1, 5)).map(lambda r: range(r[0], sum(r)))


@given(st.lists(st.tuples(names, ranges, ranges), min_size=1, max_size=3))
def test_a_clash_is_found_exactly_where_there_is_one(rows):
    found = [
        Pattern(f"p{k}[{{0}}][{{1}}]", name, (a, b), (), (), "act", "param", "gain", ())
        for k, (name, a, b) in enumerate(rows)
    ]
    counts = Counter(t.name for p in found for t in p.tensors())
    try:
        check_names([Named(p, ()) for p in found])
    except NameClash:
        assert max(counts.values()) > 1
    else:
        assert max(counts.values()) == 1
