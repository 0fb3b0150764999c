"""Pipeline schedules beside the published formulas of their bubbles."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.planning.pipeline import SCHEDULES, Chunk, Times, simulate

EIGHTHS = st.integers(1, 32).map(lambda n: n / 8)  # exact in binary
PIPELINES = [(2, 6), (4, 8), (4, 20), (8, 32), (16, 120)]
FEW = settings(max_examples=6)


def bubbles(schedule, ranks, micro_batches, f, i, w, pair=None):
    """Seconds that each rank waits: forward f, backward i for inputs and w for weights."""
    times = [Times(f, i + w, i, w)] * ranks
    turns = SCHEDULES[schedule](ranks, micro_batches)
    run = simulate(turns, times, None if pair is None else lambda *_: pair)
    return [run.bubble(rank) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "micro_batches"), PIPELINES)
@FEW
@given(f=EIGHTHS, i=EIGHTHS, w=EIGHTHS)
def test_the_bubble_of_1f1b(ranks, micro_batches, f, i, w):
    """(PP - 1)(F + B), B the whole backward."""
    assert bubbles("1f1b", ranks, micro_batches, f, i, w) == [(ranks - 1) * (f + i + w)] * ranks


@pytest.mark.parametrize(("ranks", "micro_batches"), PIPELINES)
@FEW
@given(f=EIGHTHS, i=EIGHTHS, share=st.integers(0, 8))
def test_the_bubble_of_zb1p(ranks, micro_batches, f, i, share):
    """(PP - 1)(F + B - 2W), where a weight part is no longer than a forward or an input part."""
    w = min(f, i) * share / 8
    formula = (ranks - 1) * (f + (i + w) - 2 * w)
    assert bubbles("zb1p", ranks, micro_batches, f, i, w) == [formula] * ranks


@pytest.mark.parametrize(("ranks", "micro_batches"), PIPELINES)
@FEW
@given(f=EIGHTHS, more=EIGHTHS, share=st.integers(0, 8), hidden=st.integers(0, 8))
def test_the_bubble_of_dualpipe(ranks, micro_batches, f, more, share, hidden):
    """(PP/2 - 1)(F&B + B - 3W), where a forward is no longer than a backward's input part and no
    shorter than its weight part, however much of F a pair hides. The ranks in the middle wait so
    long; those further out run more chunks alone, and where pairs overlap they wait less."""
    w, i = f * share / 8, f + more
    pair = (i + w) + f * (8 - hidden) / 8
    formula = (ranks / 2 - 1) * (pair + (i + w) - 3 * w)
    found = bubbles("dualpipe", ranks, micro_batches, f, i, w, pair)
    assert found[ranks // 2] == max(found) == formula
    if hidden == 0:
        assert found == [formula] * ranks


def test_where_the_formula_of_dualpipe_does_not_hold():
    """A forward that is longer than a backward's input part is what the others wait for: with
    F = 2, B = 1.5, W = 0.5 and F&B = 3.5 the formula says 3 x 3.5 on 8 ranks; it is 3 x 4.5."""
    assert bubbles("dualpipe", 8, 32, 2.0, 1.0, 0.5, 3.5) == [3 * (3.5 + 2.0 - 2 * 0.5)] * 8


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_chunk_runs_once(schedule):
    """Whatever the schedule, every rank runs each micro-batch forward and back, whole."""
    ranks, micro_batches = 6, 14
    for turns in SCHEDULES[schedule](ranks, micro_batches):
        chunks = [chunk for turn in turns for chunk in turn]
        forward = {(c.direction, c.number) for c in chunks if c.kind == "F"}
        inputs = [(c.direction, c.number) for c in chunks if c.kind in "BI"]
        weights = [(c.direction, c.number) for c in chunks if c.kind in "BW"]
        assert len(forward) == micro_batches
        assert sorted(inputs) == sorted(weights) == sorted(forward)


def test_what_is_kept_at_most():
    """1F1B: as many as ranks follow; DualPipe: PP + 1 (arXiv:2412.19437, table 2)."""
    times = [Times(1.0, 2.0, 1.0, 1.0, memory=1.0)] * 8

    def flight(schedule):
        return simulate(SCHEDULES[schedule](8, 24), times).flight

    assert flight("1f1b") == [8, 7, 6, 5, 4, 3, 2, 1]
    assert flight("zb1p") == [8] * 8
    assert flight("dualpipe") == [9] * 8


def test_what_is_sent_takes_time():
    times = [Times(1.0, 1.0, 0.5, 0.5)] * 4
    turns = SCHEDULES["1f1b"](4, 1)
    assert simulate(turns, times, send=0.25).end == 4 + 4 + 6 * 0.25


def test_a_schedule_that_waits_for_itself_is_refused():
    backward_first = [[(Chunk("B", 0, 0),), (Chunk("F", 0, 0),)]]
    with pytest.raises(ValueError, match="waits for itself"):
        simulate(backward_first, [Times(1.0, 1.0, 0.5, 0.5)])


@pytest.mark.parametrize(("ranks", "micro_batches"), [(3, 12), (4, 7), (4, 6)])
def test_dualpipe_wants_even_numbers(ranks, micro_batches):
    with pytest.raises(ValueError, match="even"):
        SCHEDULES["dualpipe"](ranks, micro_batches)
