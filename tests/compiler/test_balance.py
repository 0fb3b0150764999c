"""Placing blocks and copies on ranks: the published example, and never worse than that scheme."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.balance import BalanceError, balance, placed, unmeasured
from compiler.pipeline import compile_model
from compiler.shards import shards

# DeepSeek's EPLB, README: 12 experts, 16 replicas, 4 groups, 2 nodes, 8 GPUs.
PUBLISHED = [
    ([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
     [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]),
    ([20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
     [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("loads", "places"), PUBLISHED)
def test_the_published_example_comes_out(loads, places):
    assert list(balance(loads, 16, groups=4, nodes=2, ranks=8).numbers) == places


def greedy_packs(weights, packs):
    """The scheme's packing, as its authors describe it: heaviest first, to the lightest."""
    room, out, sums = len(weights) // packs, [[] for _ in range(packs)], [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        open_packs = [p for p in range(packs) if len(out[p]) < room]
        pack = min(open_packs, key=lambda p: (sums[p], p))
        out[pack].append(item)
        sums[pack] += weights[item]
    return out


def published(loads, places, groups, nodes, ranks):
    """The scheme as published: groups to nodes, copies within nodes, copies to GPUs."""
    if groups % nodes:
        groups, nodes = 1, 1
    each = len(loads) // groups
    totals = [sum(loads[g * each : (g + 1) * each]) for g in range(groups)]
    numbers = []
    for node in greedy_packs(totals, nodes):
        own = [g * each + i for g in node for i in range(each)]
        count = dict.fromkeys(own, 1)
        phys = list(own)
        for _ in range(places // nodes - len(own)):
            most = max(own, key=lambda b: loads[b] / count[b])
            phys.append(most)
            count[most] += 1
        shares = [loads[b] / count[b] for b in phys]
        numbers += [phys[i] for pack in greedy_packs(shares, ranks // nodes) for i in pack]
    return placed(loads, numbers, ranks)


SHAPES = st.sampled_from(
    [(12, 16, 4, 2, 8), (256, 288, 8, 4, 32), (64, 72, 8, 3, 24), (16, 16, 4, 2, 4),
     (256, 288, 8, 18, 144), (8, 12, 1, 1, 2), (6, 9, 3, 3, 9)]
)  # fmt: skip


@settings(max_examples=40)
@given(SHAPES, st.sampled_from(["even", "zipf", "some zero"]), st.randoms(use_true_random=False))
def test_no_rank_is_busier_than_in_the_published_scheme(shape, kind, random):
    blocks, places, groups, nodes, ranks = shape
    loads = [random.randint(1, 100) for _ in range(blocks)]
    if kind == "zipf":
        loads = [1000 / (i + 1) ** 1.1 for i in random.sample(range(blocks), blocks)]
    elif kind == "some zero":
        loads = [load * random.randint(0, 1) for load in loads]
    ours = balance(loads, places, groups, nodes, ranks)
    theirs = published(loads, places, groups, nodes, ranks)
    assert max(ours.loads) <= max(theirs.loads) * (1 + 1e-9)
    assert sorted(set(ours.numbers)) == list(range(blocks))
    assert sum(map(len, ours.places)) == places == len(ours.numbers)
    assert all(ours.numbers[p] == b for b, ps in enumerate(ours.places) for p in ps)


def test_a_groups_blocks_stay_on_one_node():
    loads = [float(i) for i in range(16)]
    numbers = balance(loads, 16, groups=4, nodes=2, ranks=4).numbers
    first, second = ({n // 4 for n in numbers[:8]}, {n // 4 for n in numbers[8:]})
    assert not first & second


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_without_loads_blocks_lie_in_order_and_copies_on_their_node(nodes, among, own, each):
    """Every block lies somewhere on its node; no rank has one twice unless it has all of them."""
    blocks, ranks = nodes * own, nodes * among
    places = ranks * max(each, -(-own // among))
    numbers = unmeasured(blocks, places, nodes, ranks)
    assert len(numbers) == places and set(numbers) == set(range(blocks))
    for node in range(nodes):
        there = numbers[places // nodes * node : places // nodes * (node + 1)]
        assert set(there) == set(range(own * node, own * (node + 1)))
    for rank in range(ranks):
        mine = numbers[places // ranks * rank : places // ranks * (rank + 1)]
        assert len(set(mine)) == min(len(mine), own)


def test_the_published_deployments_without_loads():
    """Of 256 experts and 32 copies: 9 on each of 32 ranks, two groups of 32 on each of 4 nodes; two
    on each of 144 ranks, whose 18 nodes the 8 groups do not divide over."""
    done = compile_model("models/dsv3.arch", deploy="prefill")
    arrays = [shard.arrays for _, shard in shards(done.after("elaborate"), done.program)]
    assert {(a.redundant, a.nodes) for own in arrays for a in own if a} == {(32, 4)}
    numbers = unmeasured(256, 288, 4, 32)
    assert {sum(1 / numbers.count(b) for b in numbers[9 * r : 9 * r + 9]) for r in range(32)} == {8}
    numbers = unmeasured(256, 288, 1, 144)
    assert (
        max(sum(1 / numbers.count(b) for b in numbers[2 * r : 2 * r + 2]) for r in range(144)) == 2
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0] * 12, 15, 1, 1, 8), "15 places cannot be shared by 8 GPUs"),
        (([1.0] * 12, 8, 1, 1, 8), "12 blocks do not fit into 8 places"),
        (([1.0] * 12, 16, 5, 1, 8), "12 blocks do not fall into 5 groups"),
        (([1.0] * 12, 16, 1, 3, 8), "8 GPUs cannot be shared by 3 nodes"),
        (([1.0, -1.0], 2, 1, 1, 2), "a load is a finite number that is not negative"),
    ],
)
def test_numbers_that_do_not_fit(arguments, message):
    with pytest.raises(BalanceError) as raised:
        balance(*arguments)
    assert str(raised.value) == message
