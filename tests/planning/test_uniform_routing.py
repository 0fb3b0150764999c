"""What a token reaches: the closed form beside counting every choice of a small router."""

from collections import Counter
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.planning.routing import Router, spread


def every_choice(router: Router) -> list[tuple[int, ...]]:
    """All picks that the router can make, each as often as it is made."""
    size = router.group_size
    found = []
    for opened in combinations(range(router.groups), router.open):
        blocks = [g * size + i for g in opened for i in range(size)]
        found += list(combinations(blocks, router.picks))
    return found


@st.composite
def routers(draw: st.DrawFn) -> Router:
    groups = draw(st.integers(1, 4))
    size = draw(st.integers(1, 4))
    opened = draw(st.integers(1, groups))
    picks = draw(st.integers(1, min(4, opened * size)))
    return Router(groups * size, picks, groups, opened)


@given(routers(), st.data())
def test_what_is_reached_is_what_counting_says(router, data):
    some = data.draw(st.sets(st.integers(0, router.blocks - 1)))
    choices = every_choice(router)
    hits = sum(1 for choice in choices if some & set(choice))
    assert router.reaches(some) == Fraction(hits, len(choices))


@given(routers(), st.data())
def test_copies_between_nodes_are_what_counting_says(router, data):
    ranks = data.draw(st.sampled_from([n for n in range(1, 9) if router.blocks % n == 0]))
    per_node = data.draw(st.integers(1, ranks))
    nodes = [rank // per_node for rank in range(ranks)]
    each = router.blocks // ranks
    choices = every_choice(router)
    counted: Counter[str] = Counter()
    for own in range(ranks):
        for choice in choices:
            reached = {block // each for block in choice}
            counted["ranks"] += len(reached)
            counted["nodes"] += len({nodes[r] for r in reached})
            counted["other_ranks"] += len(reached - {own})
            counted["other_nodes"] += len({nodes[r] for r in reached} - {nodes[own]})
            counted["picks_out"] += sum(nodes[b // each] != nodes[own] for b in choice)
            counted["picks_up"] += sum(
                nodes[b // each] == nodes[own] and b // each != own for b in choice
            )
            for node in (
                {nodes[r] for r in reached} if len(set(map(nodes.count, nodes))) == 1 else ()
            ):
                local = [r for r in range(ranks) if nodes[r] == node]
                enters = local[own % len(local)]  # the rank with the sender's place in its node
                counted["forwarded"] += len(reached & set(local) - {enters})
    found = spread(router, nodes)
    for name, count in counted.items():
        assert getattr(found, name) == pytest.approx(count / ranks / len(choices)), name


def test_the_published_training_deployment():
    """256 experts in 8 groups of which 4 are open, 8 picked, on 64 GPUs of 8 nodes."""
    where = spread(Router(256, 8, groups=8, open=4), [rank // 8 for rank in range(64)])
    assert round(where.ranks, 2) == 7.36
    assert int(where.nodes * 100) / 100 == 3.62
    assert where.other_nodes == pytest.approx(where.nodes * 7 / 8)


def test_without_groups_more_nodes_are_reached():
    nodes = [rank // 8 for rank in range(64)]
    free = spread(Router(256, 8), nodes)
    assert free.nodes > 5 > spread(Router(256, 8, 8, 4), nodes).nodes


@pytest.mark.parametrize(
    "wrong",
    [(10, 1, 3, 1), (8, 1, 2, 3), (8, 5, 2, 1), (8, 0, 1, 1)],
    ids=["uneven groups", "more open than there are", "more picks than are open", "no pick"],
)
def test_a_router_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        Router(*wrong)
