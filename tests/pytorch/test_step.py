"""The step: packed tokens, padded histories, and what the cache remembers."""

import pytest
import torch
from torch import nn

from backends.pytorch.runtime import Cache, Step

COUNTS = [[3, 1, 2], [2, 2, 2], [1, 1], [4], [2, 0, 3], [0, 0], []]


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pad_and_pack_are_inverse(counts: list[int], axis: int) -> None:
    step = Step(counts)
    x = torch.randn(2, 3, step.total).movedim(-1, axis)
    padded = step.pad(x, axis)
    assert padded.shape[0] == len(counts)
    assert padded.shape[axis + 1] == max(counts, default=0)
    assert torch.equal(step.pack(padded, axis), x)
    for row, count in enumerate(counts):
        own = padded[row].movedim(axis, 0)
        if count:  # padding repeats the last token
            assert torch.equal(own[count:], own[count - 1].expand_as(own[count:]))


def test_equal_counts_make_views() -> None:
    step = Step([1, 1, 1])
    x = torch.randn(3, 4, 5)
    assert storage(step.pad(x)) == storage(x)
    assert storage(step.pack(step.pad(x))) == storage(x)


def test_padding_has_gradients_of_its_own_rows_only() -> None:
    step = Step([3, 1])
    x = torch.randn(4, 2, requires_grad=True)
    step.within_time(step.pad(x), 1).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(4, 2))


def test_tokens_know_their_sequence_and_position() -> None:
    cache = Cache(4)
    first = Step([2, 1], cache=cache, slots=[3, 1])
    first.commit()
    step = Step([1, 3], cache=cache, slots=[3, 1])
    assert step.sequence.tolist() == [0, 1, 1, 1]
    assert step.position.tolist() == [2, 1, 2, 3]
    assert step.slot.tolist() == [3, 1, 1, 1]
    assert step.history_position.tolist() == [[0, 1, 2, 3]] * 2
    assert step.history_valid is not None
    assert step.history_valid.tolist() == [[True, True, True, False], [True] * 4]
    assert (step.time, step.history, step.total) == (3, 4, 4)


def test_positions_may_be_given() -> None:
    position = torch.tensor([5, 6, 9])
    step = Step([2, 1], position=position)
    assert step.position.tolist() == [5, 6, 9]
    assert step.history_position.tolist() == [[5, 6], [9, 9]]


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([-1], {}, "cannot have -1 tokens"),
        ([1, 1], {"slots": [0, 0]}, "different slots"),
        ([1], {"slots": [0, 1]}, "different slots"),
        ([1], {"slots": [2], "cache": Cache(2)}, "slots 0 to 1"),
    ],
)
def test_steps_that_cannot_be(counts: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Step(counts, **options)


def test_wanted_rows() -> None:
    x = torch.arange(6.0)
    assert torch.equal(Step([3, 1, 2]).select(x), x)
    assert Step([3, 1, 2], last_only=True).select(x).tolist() == [2, 3, 5]
    assert Step([3, 0, 2], last_only=True).select(x[:5]).tolist() == [2, 4]
    assert Step([3, 1, 2], rows=torch.tensor([4, 0])).select(x).tolist() == [4, 0]


# -- the cache -------------------------------------------------------------------------------------


def module(path: str = "layers.0.attn") -> nn.Module:
    made = nn.Module()
    made.path = path
    return made


class Twin:
    """A cache, and what it should hold, as lists."""

    def __init__(self, slots: int, capacity: int | None = None):
        self.cache = Cache(slots, capacity)
        self.kept: list[list[float]] = [[] for _ in range(slots)]
        self.next = 1.0

    def step(self, counts: list[int], slots: list[int], axis: int = 0) -> torch.Tensor:
        """Append numbers; check that the histories are what was appended."""
        step = Step(counts, cache=self.cache, slots=slots)
        x = torch.arange(self.next, self.next + step.total)
        self.next += step.total
        values = torch.stack([x, -x], 1 - axis)  # [total, 2] or [2, total]
        read = step.extend(module(), "c", values, axis)
        for slot, part in zip(slots, x.split(counts), strict=True):
            self.kept[slot] += part.tolist()
        for row, slot in enumerate(slots):
            kept = torch.tensor(self.kept[slot])
            got = read[row].movedim(axis, 0)[: len(kept)]
            assert torch.equal(got, torch.stack([kept, -kept], 1))
            assert not read[row].movedim(axis, 0)[len(kept) :].any()
        step.commit()
        return read


@pytest.mark.parametrize("axis", [0, 1])
def test_ragged_steps_append_and_read(axis: int) -> None:
    twin = Twin(4)
    twin.step([3, 1, 2], [0, 1, 2], axis)
    twin.step([1, 1, 1], [0, 1, 2], axis)
    twin.step([2, 5], [3, 1], axis)
    twin.step([0, 4, 1], [2, 0, 3], axis)
    twin.step([100, 1, 1, 1], [0, 1, 2, 3], axis)  # grows
    twin.cache.truncate([2, 0, 1, 3])
    twin.kept = [kept[:n] for kept, n in zip(twin.kept, [2, 0, 1, 3], strict=True)]
    twin.step([1, 2, 3, 4], [0, 1, 2, 3], axis)
    assert twin.cache.lengths == [3, 2, 4, 7]


def test_reading_adjoining_slots_is_a_view() -> None:
    twin = Twin(4)
    before = twin.step([2, 2, 2], [1, 2, 3])
    after = twin.step([1, 1, 1], [1, 2, 3])
    assert storage(before) == storage(after)


def test_a_step_that_is_not_committed_leaves_no_trace() -> None:
    twin = Twin(1)
    twin.step([2], [0])
    Step([1], cache=twin.cache).extend(module(), "c", torch.zeros(1, 2))
    twin.step([1], [0])
    assert twin.cache.lengths == [3]


def test_a_cache_of_given_capacity_does_not_grow() -> None:
    cache = Cache(1, capacity=2)
    x = torch.zeros(3, 1)
    with pytest.raises(ValueError, match="made for 2 positions per sequence, and 3 are needed"):
        Step([3], cache=cache).extend(module(), "c", x)
    Step([2], cache=cache).extend(module(), "c", x[:2])
    assert cache.nbytes == 2 * 4


def test_each_module_and_name_has_its_own_memory() -> None:
    cache = Cache(2)
    step = Step([1, 1], cache=cache)
    step.extend(module("a"), "k", torch.ones(2, 3, dtype=torch.bfloat16))
    step.extend(module("b"), "k", torch.ones(2))
    assert cache.paths() == ["a.k", "b.k"]
    assert cache.nbytes == 2 * cache.capacity * (3 * 2 + 4)


def test_truncate_refuses_what_is_not_there() -> None:
    cache = Cache(2)
    with pytest.raises(ValueError, match="slot 1 holds 0 positions, not 1"):
        cache.truncate([0, 1])
    with pytest.raises(ValueError, match="1 lengths for 2 slots"):
        cache.truncate([0])
    cache.truncate(torch.tensor([0]), slots=[1])


def test_a_history_without_a_cache_is_the_step() -> None:
    step = Step([2, 1])
    x = torch.tensor([[1.0], [2.0], [3.0]])
    assert step.extend(module(), "c", x).tolist() == [[[1.0], [2.0]], [[3.0], [3.0]]]


def test_means_are_over_each_sequences_own() -> None:
    step = Step([3, 1])
    x = step.pad(torch.tensor([1.0, 2.0, 6.0, 5.0]))
    assert step.history_mean(x, -1).tolist() == [3.0, 5.0]
    assert step.time_mean(x[:, None].expand(-1, 2, -1), -1).tolist() == [[3.0, 3.0], [5.0, 5.0]]
