"""Tiny instances keep what makes a program one: whole extents, and enough to choose from."""

import pytest
from decoder import decoder

from compiler.ir import DYNAMIC, Program
from compiler.shrink import ShrinkError, shrink, shrunken
from compiler.spec import dims_of
from compiler.verify import verify


def test_sizes_become_small_and_stay_whole() -> None:
    small = shrink(decoder())
    assert max(small.values()) < 10
    program = shrunken(decoder(), small)
    verify(program)
    for graph in program.bodies.values():
        for node in graph:
            for dim in dims_of(node):
                if not dim.size.names & DYNAMIC:
                    assert program.size(dim) >= 1, dim


def test_rotary_halves_and_groups_stay_whole_and_choices_stay_choices() -> None:
    small = shrink(decoder())
    assert small["width"] % 2 == 0
    assert small["experts"] % small["groups"] == 0
    assert small["experts"] // small["groups"] >= 2  # the two best of a group
    assert 1 < small["open_groups"] < small["groups"]
    assert 1 < small["per_token"] < small["experts"]


def test_different_sizes_stay_different() -> None:
    small = shrink(decoder())
    assert len({small[name] for name in ("hidden", "ffn", "vocab")}) == 3


def test_no_loop_vanishes_and_an_empty_one_may_stay_empty() -> None:
    assert shrink(decoder())["layers"] > shrink(decoder())["dense"] == 1
    small = shrink(decoder(("const dense = 1", "const dense = 0")))
    assert small["dense"] == 0
    assert small["layers"] >= 1


def test_numbers_that_are_no_sizes_stay() -> None:
    small = shrink(decoder())
    assert "eps" not in small
    assert shrunken(decoder(), small).constants["eps"] == 1e-6


def test_the_published_sizes_of_a_large_model_shrink_alike() -> None:
    large = decoder(
        ("const layers = 10", "const layers = 610"),
        ("const experts = 16", "const experts = 2560"),
        ("const groups = 4", "const groups = 8"),
        ("const width = 16", "const width = 4096"),
    )
    assert shrink(large) == shrink(decoder())


def test_sizes_that_admit_nothing_small_are_refused() -> None:
    # A selected position has to be there: no candidate is that large.
    program: Program = decoder(
        ("dim o = 2\n", "dim o = 2 * groups / groups\n"),
        ("const groups = 4", "const groups = 997"),
        ("dim m = experts / groups", "dim m = experts / groups / 997"),
        ("const experts = 16", f"const experts = {2 * 997 * 997}"),
    )
    with pytest.raises(ShrinkError, match="no small values fit for"):
        shrink(program)
