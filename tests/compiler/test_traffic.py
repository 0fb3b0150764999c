"""What inspect expects tokens to send, against the published averages and a count."""

import random

import pytest

from compiler.pipeline import compile_model
from compiler.traffic import traffic
from dsl.constants import Choices


def test_pretraining_reaches_the_published_numbers_of_ranks_and_nodes():
    """7.36 of 64 GPUs and 3.62 of 8 nodes on average, the own ones included (DeepSeek-V3)."""
    (layers, _) = traffic(compile_model("dsv3", deploy="pretrain").after("shard"))
    assert layers.others == pytest.approx(7.36 * 63 / 64, abs=0.01)
    assert layers.other_nodes == pytest.approx(3.62 * 7 / 8, abs=0.01)
    row, picks = 2 * 7168, 8 * 8
    forwarded = layers.other_nodes + layers.others * 64 / 63 * 7 / 8
    assert layers.dispatch == pytest.approx(forwarded * (row + picks))
    assert layers.combine == pytest.approx(forwarded * row)


def test_the_expectation_is_what_counting_gives():
    (layers, _) = traffic(
        compile_model("dsv3", Choices(preset="small"), deploy="ep4").after("shard")
    )
    draw, others, tries = random.Random(0), 0, 20_000
    for _ in range(tries):
        groups = draw.sample(range(4), 2)
        picks = draw.sample([g * 4 + m for g in groups for m in range(4)], 4)
        others += len({p // 4 for p in picks} - {draw.randrange(4)})
    assert layers.others == pytest.approx(others / tries, rel=0.02)
    assert layers.dispatch == pytest.approx(layers.others * (2 * 256 + 4 * 8))


def test_a_program_of_one_rank_sends_nothing():
    assert traffic(compile_model("dsv3", Choices(preset="small")).program) == []
