"""What the checker proves and carries through: extents, parts, lifting, conditions, positions."""

from __future__ import annotations

from pathlib import Path

import pytest
from meaning import AROUND, blocks, meaning

from dsl.diagnostics import DiagnosticError
from dsl.program import check_file


def codes(path: Path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    return [d.code for d in check_file(str(path))]


# -- nominal extents -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "given", "fits"),
    [
        ("heads * 16", "16 * heads", True),
        ("(heads + 2) * 16", "16 * heads + 32", True),
        ("experts / groups * groups", "experts", True),
        ("heads * heads / heads", "heads", True),
        ("inner", "heads * 16", True),  # const inner = 16 * heads
        ("128", "64 + 64", True),
        ("size(d)", "hidden", True),
        ("experts", "groups", False),  # both are 8
        ("heads * 16", "heads * 15", False),
        ("experts / groups", "1", False),  # though that is what it is
        ("set_by_preset", "heads * 16", False),  # a preset gives it another value
    ],
)
def test_extents_are_equal_if_they_are_whatever_the_constants_are(
    declared: str, given: str, fits: bool, tmp_path: Path
) -> None:
    text = f"""
    const heads = 4
    const experts = 8
    const groups = 8
    const hidden = 64
    const inner = 16 * heads
    const set_by_preset = 16 * heads
    dims other {{ set_by_preset = 7 }}
    index d : hidden, p : {declared}, q : {given}
    block B {{
      param W[p, d]
      def (x[d]) -> y[q] {{ y[q] = W[q,d] * x[d] }}
    }}
    """
    assert codes(tmp_path / "b.arch", text) == ([] if fits else ["E0402"])


def test_two_indices_of_one_extent_are_two_indices(tmp_path: Path) -> None:
    """Renaming is allowed where it is written; nothing is joined because it fits."""
    text = """
    index a : 8, b : 8
    block B {
      param W[a, b]
      def (x[a]) -> y[b] { y[b] = W[a,b] * x[a] }
      def turned(x[a]) -> y[b] { y[b] = W[b,a] * x[a] }
      def wrong(x[a]) -> y[b] { y[b] = x[a] + x[a] }
    }
    """
    assert codes(tmp_path / "b.arch", text) == ["E0405"]


# -- sums, products, aliases -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equation", "inputs", "expected"),
    [
        ("y[t,n] = x[t,n]", "x[t,n|j]", "x[t, n]"),
        ("y[t,j] = x[t,j]", "x[t,n|j]", "x[t, j]"),
        ("y[t,n|j] = x[t,n|j]", "x[t,n|j]", "x[t, n|j]"),
        ("y[t,h,j] = x[t,(h,j)]", "x[t,(h,n|j)]", "x[t, (h, j)]"),
        ("y[t,h,o] = x[t,(h,o)]", "x[t,(h,j)]", "x[t, (h, o)]"),  # o and j have the same extent
        ("y[t,h,n] = x[t,(h,n)]", "x[t,(h,n)|j]", "x[t, (h,n) at (h, n)]"),
        ("y[t,g,m] = x[t,(g,m)]", "x[t,e]", "x[t, (g, m)]"),  # e = (g, m)
        ("y[t,e] = x[t,e]", "x[t,(g,m)]", "x[t, e]"),
        ("y[t,n] = x[t,n,0] + x[t,n,1]", "x[t,n,o]", "add(x[t, n, 0], x[t, n, 1])"),
        ("y[t,o,n] = stack[o](x[t,n], -x[t,n])", "x[t,n]", "stack[o](x[t, n], neg(x[t, n]))"),
    ],
)
def test_parts_are_taken_by_name(equation: str, inputs: str, expected: str, tmp_path: Path) -> None:
    assert meaning(tmp_path / "b.arch", equation, inputs) == expected


# -- lifting ---------------------------------------------------------------------------------------

LIFTED = """
fn halve(x) -> y { y = x / 2 }
fn normal[i](x[i]) -> y[i] { y[i] = x[i] / sum[i](x[i]) }
block Inner[p, q] {
  param M[q, p]
  def (x[p]) -> y[q] { y[q] = M[q,p] * x[p] }
}
"""


@pytest.mark.parametrize(
    ("call", "inputs", "free"),
    [
        ("halve(x[t,d])", "x[t,d]", ["t", "d"]),
        ("normal[d](x[t,d])", "x[t,d]", ["t", "d"]),
        ("normal[d](x[t,h,d])", "x[t,h,d]", ["t", "h", "d"]),
        ("inner(x[t,d])", "x[t,d]", ["t", "f"]),
        ("inner(x[t,h,d])", "x[t,h,d]", ["t", "h", "f"]),
        ("sum[h](inner(x[t,h,d]))", "x[t,h,d]", ["t", "f"]),
        ("each[e](x[t,d])", "x[t,d]", ["e", "t", "f"]),
    ],
)
def test_a_callee_names_only_what_it_uses(
    call: str, inputs: str, free: list[str], tmp_path: Path
) -> None:
    """All other indices of an argument are carried through, under the caller's names."""
    left = f"y[{','.join(free)}]"
    text = f"""{AROUND}{LIFTED}
    block B {{
      use inner = Inner[d, f], each[e] = Inner[d, f]
      def ({inputs}) -> {left} {{ {left} = {call} }}
    }}
    """
    (block,) = blocks(tmp_path / "b.arch", text)
    value = block.defs["call"].equations[-1].value
    assert {str(a) for a in value.free} == set(free)


def test_lifting_is_hygienic(tmp_path: Path) -> None:
    """A callee's own index is another one than the caller's of the same name."""
    text = f"""{AROUND}
    block Inner[p] {{
      index h : 3
      param M[h, p]
      def (x[p]) -> y[p] {{
        z[h] = M[h,p] * x[p]
        y[p] = M[h,p] * z[h]
      }}
    }}
    block B {{
      use inner = Inner[d]
      def (x[t,h,d]) -> y[t,h,d] {{ y[t,h,d] = inner(x[t,h,d]) }}
    }}
    """
    assert codes(tmp_path / "b.arch", text) == []


def test_a_value_hides_no_index(tmp_path: Path) -> None:
    """In brackets a name is an index if it can be one: a number is no position."""
    equation = "n[t,n] = x[t,n] * 2\n    s = 3\n    y[t,n] = n[t,n] * s"
    assert meaning(tmp_path / "b.arch", equation, "x[t,n]") == "n[t, n] * s"


def test_constants_of_other_files_are_no_reserved_names(tmp_path: Path) -> None:
    """The standard library's constants (value, heads) may be names of values and indices."""
    text = """
    import std.mla
    index t : time, d : 8, value : 4
    block B {
      param heads[value, d]
      def (x[t,d]) -> y[t,value] {
        nope[t,value] = heads[value,d] * x[t,d]
        y[t,value] = 2 * nope[t,value]
      }
    }
    """
    assert codes(tmp_path / "b.arch", text) == []


# -- compile-time conditions -----------------------------------------------------------------------


def ways(tmp_path: Path, members: str) -> list[set[str]]:
    """What is stored under each way the conditions of a block can turn out."""
    text = "const a = 1\nconst b = null\nconst k = 3\n" + "block B {\n" + members + "\n}\n"
    return [{s.name for s in b.stored} for b in blocks(tmp_path / "b.arch", text)]


def test_every_way_is_checked(tmp_path: Path) -> None:
    found = ways(tmp_path, "if a > 0 { param P } if b != null { param Q }")
    assert sorted(map(sorted, found)) == [[], ["P"], ["P", "Q"], ["Q"]]


def test_ways_that_cannot_be_are_not(tmp_path: Path) -> None:
    chain = "if k == 1 { param P } else if k == 2 { param Q } else { param R }"
    assert sorted(map(sorted, ways(tmp_path, chain))) == [["P"], ["Q"], ["R"]]
    ordered = "if k > 1 { param P } if k > 2 { param Q } if not (k <= 1) { param R }"
    assert sorted(map(sorted, ways(tmp_path, ordered))) == [[], ["P", "Q", "R"], ["P", "R"]]


@pytest.mark.parametrize("condition", ["b != null", "b!=null", "(b != null)", "not (b == null)"])
def test_a_condition_is_the_same_however_it_is_written(condition: str, tmp_path: Path) -> None:
    text = f"""
    const b = null
    index d : 8
    block B {{
      if b != null {{ param W[d] }}
      def (x[d]) -> y[d] {{
        if {condition} {{ y[d] = W[d] * x[d] }} else {{ y[d] = x[d] + x[d] }}
      }}
    }}
    """
    assert codes(tmp_path / "b.arch", text) == []


def test_the_branch_that_is_not_taken_is_checked_too(tmp_path: Path) -> None:
    text = """
    const gated = false
    index d : 8
    block B {
      def (x[d]) -> y[d] {
        if gated { y[d] = x[d] * gate[d] } else { y[d] = x[d] + x[d] }
      }
    }
    """
    assert codes(tmp_path / "b.arch", text) == ["E0204"]


def test_many_conditions_still_reach_every_branch(tmp_path: Path) -> None:
    """2^12 ways are too many; a mistake in any one branch, or in any two together, is found."""
    names = [f"c{n}" for n in range(12)]
    consts = "".join(f"const {n} = true\n" for n in names)
    for wrong in (0, 5, 11):
        read = ["oops" if i == wrong else "x" for i in range(12)]
        branches = "".join(
            f"if {n} {{ u{n}[d] = x[d] + x[d] }} else {{ u{n}[d] = {r}[d] * 2 }}\n"
            for n, r in zip(names, read, strict=True)
        )
        text = (
            f"{consts}index d : 8\nblock B {{ def (x[d]) -> y[d] {{\n{branches}"
            f"if c3 {{ param_like[d] = x[d] + x[d] }}\n"
            f"if not c7 {{ y[d] = param_like[d] * 2 }} else {{ y[d] = uc1[d] * 2 }}\n}} }}"
        )
        found = codes(tmp_path / "b.arch", text)
        assert sorted(found) == [
            "E0204",
            "E0204",
        ]  # oops, and param_like where c3 and c7 do not hold


# -- positions -------------------------------------------------------------------------------------


def test_a_pick_may_only_index_what_it_was_picked_from(tmp_path: Path) -> None:
    equation = "pick[t,k] = argtop[e -> k](x[t,e])\n    y[t,k] = {}[pick[t,k]]"
    assert meaning(tmp_path / "b.arch", equation.format("load"), "x[t,e]") == "load[pick[t, k]]"
    with pytest.raises(DiagnosticError, match="E0404"):
        meaning(tmp_path / "b.arch", equation.format("gain"), "x[t,e]")


def test_a_mask_is_a_truth_value(tmp_path: Path) -> None:
    equation = "y[t,e] = where(in_top[e, 2](x[t,e]), x[t,e], -inf)"
    assert meaning(tmp_path / "b.arch", equation, "x[t,e]") == (
        "where(in_top[e](x[t, e]), x[t, e], -inf)"
    )
    with pytest.raises(DiagnosticError, match="E0602"):
        meaning(tmp_path / "b.arch", "y[t,e] = x[t,e] * in_top[e, 2](x[t,e])", "x[t,e]")
