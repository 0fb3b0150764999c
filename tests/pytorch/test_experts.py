"""Arrays of blocks: rows are grouped by what they picked, and nobody else's weights are touched."""

import pytest
import torch
from torch import Tensor, nn

from backends.pytorch.runtime import Numbered, apply, experts

D, F, E = 5, 3, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(F, D))
        self.calls: list[int] = []

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        self.calls.append(len(x))
        y = torch.tanh(x @ self.weight.T)
        return y if not more else y * more[0]

    def other(self, x: Tensor) -> Tensor:
        return -self.forward(x)


@pytest.fixture
def blocks() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block() for _ in range(E))


def each(blocks: nn.ModuleList, pick: Tensor, x: Tensor) -> Tensor:
    """``[*rows, f]``, one row at a time."""
    x = x.expand(*pick.shape, D)
    rows = [
        torch.tanh(blocks[int(e)].weight @ r)
        for e, r in zip(pick.flatten(), x.flatten(0, -2), strict=True)
    ]
    return torch.stack(rows).unflatten(0, pick.shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (7, 2), (3, 2, 2)])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_apply(blocks: nn.ModuleList, shape: tuple[int, ...], shared: int) -> None:
    """Arguments are the same for all along the axes that they lack."""
    pick = torch.randint(E, shape)
    lead = [1 if axis >= len(shape) - shared else n for axis, n in enumerate(shape)]
    x = torch.randn(*lead, D)
    torch.testing.assert_close(apply(blocks, pick, x), each(blocks, pick, x))
    torch.testing.assert_close(apply(blocks, pick, x, method="other"), -each(blocks, pick, x))


def test_a_block_runs_once_on_its_rows_and_others_not_at_all(blocks: nn.ModuleList) -> None:
    pick = torch.tensor([[4, 1], [1, 4], [4, 1], [2, 4]])
    apply(blocks, pick, torch.randn(4, 1, D))
    assert [block.calls for block in blocks] == [[], [3], [1], [], [4], []]


@pytest.mark.parametrize("tokens", [1, 6])
def test_experts_sum_by_gate(blocks: nn.ModuleList, tokens: int) -> None:
    pick, gate, x = torch.randint(E, (tokens, 3)), torch.randn(tokens, 3), torch.randn(tokens, D)
    got = experts(blocks, pick, gate, x[:, None])
    wanted = torch.einsum("tk,tkf->tf", gate, each(blocks, pick, x[:, None]))
    torch.testing.assert_close(got, wanted)


def test_the_sum_is_f32(blocks: nn.ModuleList) -> None:
    blocks.bfloat16()
    pick, x = torch.zeros(1, 2, dtype=torch.int64), torch.randn(1, 1, D, dtype=torch.bfloat16)
    assert experts(blocks, pick, torch.ones(1, 2), x).dtype == torch.float32
    assert experts(blocks, pick, torch.ones(1, 2).bfloat16(), x).dtype == torch.bfloat16


def test_gradients(blocks: nn.ModuleList) -> None:
    pick = torch.tensor([[0, 3], [3, 3], [1, 0]])
    gate, x = torch.randn(3, 2, requires_grad=True), torch.randn(3, D, requires_grad=True)
    leaves = [gate, x, *(block.weight for block in blocks)]
    ours = torch.autograd.grad(
        experts(blocks, pick, gate, x[:, None]).square().sum(), leaves, allow_unused=True
    )
    plain = torch.einsum("tk,tkf->tf", gate, each(blocks, pick, x[:, None])).square().sum()
    for got, wanted in zip(
        ours, torch.autograd.grad(plain, leaves, allow_unused=True), strict=True
    ):
        if wanted is None:
            assert got is None
        else:
            torch.testing.assert_close(got, wanted)


def test_no_rows(blocks: nn.ModuleList) -> None:
    pick = torch.zeros(0, 2, dtype=torch.int64)
    assert apply(blocks, pick, torch.zeros(0, 1, D)).shape == (0, 2, F)
    assert experts(blocks, pick, torch.zeros(0, 2), torch.zeros(0, 1, D)).shape == (0, F)


def test_an_argument_that_all_rows_share(blocks: nn.ModuleList) -> None:
    pick, x, more = torch.randint(E, (4, 2)), torch.randn(4, 1, D), torch.randn(F)
    got = apply(blocks, pick, x, more, whole=(1,))
    torch.testing.assert_close(got, each(blocks, pick, x) * more)


def test_blocks_may_have_numbers_of_their_own(blocks: nn.ModuleList) -> None:
    numbered = Numbered(enumerate(blocks, start=3))
    pick, x = torch.randint(E, (4, 2)), torch.randn(4, 1, D)
    torch.testing.assert_close(apply(numbered, pick, x, start=3), each(blocks, pick, x))
    assert sorted(numbered.state_dict())[0] == "3.weight"


def test_a_pick_that_is_no_block(blocks: nn.ModuleList) -> None:
    with pytest.raises(IndexError, match=f"picks 0 .. {E} of {E} blocks"):
        apply(blocks, torch.tensor([[0, E]]), torch.zeros(1, 1, D))


def test_without_gradients_memory_is_used_again_and_never_by_two():
    """Blocks within blocks, both in inference mode and after it, give what gradients give."""

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            pick = torch.arange(2 * len(x)).reshape(-1, 2) % 3
            return experts(self.inner, pick, torch.full((len(x), 2), 0.5), x[:, None])

    torch.manual_seed(0)
    outer = torch.nn.ModuleList(Outer() for _ in range(4))
    x, pick = torch.randn(5, 4), torch.arange(15).reshape(5, 3) % 4
    gate = torch.rand(5, 3)
    expected = experts(outer, pick, gate, x[:, None])
    assert expected.requires_grad
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.allclose(experts(outer, pick, gate, x[:, None]), expected, atol=1e-6)
    with torch.no_grad():
        none = experts(outer[0].inner, pick[:0], gate[:0], x[:0, None])
    assert none.shape == (0, 4)
