"""FLOPs, parameters and cache of a program, and what the published model's figures are made of."""

from pathlib import Path

import pytest
from lowered import Body, dim, low_rank_attention, program, shared_key_attention, t

from compiler.cost import flops_of, lengths
from compiler.ir import Program, Type
from compiler.passes import elaborate, masks
from compiler.report import Report, report
from dsl.constants import Choices
from dsl.program import open_program

MODELS = Path(__file__).resolve().parents[2] / "models"
GROUPED = {"hidden": 512, "kv_heads": 2, "per_group": 4, "width": 64}


def elaborated(set: dict[str, int] | None = None) -> Program:
    choices = Choices(set=set or {})
    return elaborate.run(open_program(str(MODELS / "dsv3.arch"), choices, None))


@pytest.fixture(scope="module")
def published() -> Report:
    return report(elaborated())


# -- the published model -------------------------------------------------------------------------


def test_the_published_figures(published: Report) -> None:
    assert published.parameters == 671_026_404_352
    assert published.activated == 36_625_603_584
    assert published.others == 11_610_067_968
    assert published.cache_bytes_per_token == 70_272
    assert published.training_flops == pytest.approx(250e9, rel=0.01)


def test_flops_are_those_of_activated_parameters_and_causal_attention(published: Report) -> None:
    """Two per activated parameter that is in a product (gains are not), and per visible pair."""
    layers, heads, width, value, length = 61, 128, 192, 128, 4096
    gains = layers * (2 * 7168 + 1536 + 512) + 7168
    pairs = (length + 1) / 2
    attention = layers * 2 * heads * (width + value) * pairs
    gate = 58 * 2 * 8 * 7168  # the gate-weighted sum of eight experts
    expected = 2 * (published.activated - gains) + attention + gate
    assert published.forward_flops == pytest.approx(expected, rel=1e-12)


def test_blocks_add_up(published: Report) -> None:
    rows = {row.path: row for row in published.blocks}
    model, dense, sparse = rows[""], rows["layers[0..3]"], rows["layers[3..61]"]
    assert (model.parameters, model.activated) == (published.parameters, published.activated)
    head = embedding = 129_280 * 7168
    inner = dense.parameters + sparse.parameters + rows["norm"].parameters
    assert model.parameters == inner + head + embedding
    assert model.activated == dense.activated + sparse.activated + 7168 + head
    expert = rows["layers[3..61].mlp.expert[0..256]"]
    assert expert.count == 58 * 256
    assert expert.activated * 256 == expert.parameters * 8
    assert expert.span.startswith("std/ffn.arch:")


# -- which side of a branch, and what a mask lets see --------------------------------------------


def test_a_short_sequence_takes_the_side_for_few_positions() -> None:
    """Per pair of positions the absorbed attention costs 2 * heads * (2 * rank + turned)."""
    made = low_rank_attention()
    heads, rank, width, turned = 128, 512, 128, 64
    pairs = {n: (n + 1) / 2 for n in (16, 4096)}
    absorbed = 2 * heads * (2 * rank + turned)
    expanded = 2 * heads * (2 * width + turned)
    short, long = (report(made, n).forward_flops for n in (16, 4096))
    # The weights that are absorbed into queries cost as much per token as those that expand keys.
    assert short - long == pytest.approx(absorbed * pairs[16] - expanded * pairs[4096])


@pytest.mark.parametrize("window", [None, 64])
def test_attention_is_counted_where_the_mask_lets_see(window: int | None) -> None:
    length, heads, width = 256, 8, 64
    made = shared_key_attention(GROUPED, window)
    unseen = 0 if window is None else (length - window) * (length - window + 1) // 2
    pairs = length * (length + 1) // 2 - unseen
    projections = 2 * sum(p.elements for p in _parameters(made))
    expected = projections + 4 * heads * width * pairs / length
    assert report(made, length).forward_flops == pytest.approx(expected)


def _parameters(program: Program):  # type: ignore[no-untyped-def]
    from compiler.tensors import patterns

    return patterns(program)


@pytest.mark.parametrize("least", [None, -3, 0, 2])
@pytest.mark.parametrize("beyond", [None, -1, 1, 4, 9])
def test_visible_pairs_are_counted_exactly(least: int | None, beyond: int | None) -> None:
    length = 6
    seen = sum(
        (least is None or least <= at - past) and (beyond is None or at - past < beyond)
        for at in range(length)
        for past in range(length)
    )
    assert masks.visible((least, beyond), length) == pytest.approx(seen / length**2)


# -- ops -----------------------------------------------------------------------------------------


def test_a_contraction_is_two_flops_per_multiply_add() -> None:
    d, f = dim("d", "hidden"), dim("f", "ffn")
    b = Body("M.call")
    x = b.input("x", t, d)
    y = b.contract(b.param("W", f, d), x, over="d")
    graph = b.done(b.map("exp", y))
    at = lengths({"hidden": 7, "ffn": 11}, time=3)
    assert sum(flops_of(graph, node, at) for node in graph) == 2 * 3 * 7 * 11


def test_a_table_that_is_only_looked_up_in_is_not_activated() -> None:
    w, d = dim("w", "vocab"), dim("d", "hidden")
    b = Body("M.call")
    token = b.input("token", t, dtype="i64", of=w)
    row = b("gather", b.param("table", w, d), token, type=Type("act", (t, d)), dim="w")
    made = program(
        b.done(b.contract(row, b.param("head", w, d), over="d")), {"vocab": 50, "hidden": 8}
    )
    found = report(made)
    assert (found.parameters, found.activated) == (800, 400)


def test_counting_does_not_go_through_layers_and_experts() -> None:
    """Ten times as many of each are counted by the same visits."""
    few, many = elaborated(), elaborated({"layers": 610, "experts": 2560})
    assert sum(len(g) for g in few.bodies.values()) == sum(len(g) for g in many.bodies.values())
    assert len(report(few).blocks) == len(report(many).blocks)
