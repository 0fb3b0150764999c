"""Products of a few rows: the C behind them against torch, and which products it takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.pytorch.ahead import build
from backends.pytorch.ahead.blocks import BlockedWeight, widened
from backends.pytorch.ahead.decoder import _loaded
from backends.pytorch.ahead.processor import features
from backends.pytorch.ahead.rows import MOST_ROWS, NEEDS, FewRows, few_rows, few_rows_of_blocks

LACKING = sorted(set(NEEDS) - set(features()))
needs_bfloat16 = pytest.mark.skipif(bool(LACKING), reason=f"this CPU lacks {', '.join(LACKING)}")
BLOCK = (48, 80)


class Both(nn.Module):
    def forward(self, x: Tensor, weight: Tensor, data: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return few_rows(x, weight), few_rows_of_blocks(x, data, scale, *BLOCK)


@pytest.fixture(scope="module")
def compiled():
    """``few_rows`` and ``few_rows_of_blocks`` as machine code."""
    x, weight, (data, scale) = torch.zeros(5, 6), torch.zeros(7, 6), stored(9, 6)
    examples = x.bfloat16(), weight.bfloat16(), data, scale
    return _loaded(build.packaged(build._of_any_size(Both(), *examples)))


def stored(n: int, k: int) -> tuple[Tensor, Tensor]:
    """The bytes of a weight, and their scales."""
    blocks = -(-n // BLOCK[0]), -(-k // BLOCK[1])
    return torch.randint(0x78, (n, k)).to(torch.uint8), torch.rand(blocks)


@pytest.fixture
def wide(compiled):
    return lambda x, weight: compiled([x, weight, *stored(3, x.shape[1])])[0]


def made(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m * n + k)
    return tuple(torch.randn(*size, generator=generator).bfloat16() for size in ((m, k), (n, k)))


def error(found: Tensor, x: Tensor, weight: Tensor) -> float:
    exact = F.linear(x.double(), weight.double())
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    return float((found.double() - exact).abs().max() / exact.abs().max())


# Each number of 16 rows is another path, and so is each end: of rows, of tiles, of weights.
SIZES = [
    *((m, 100, 64) for m in (2, 15, 16, 17, 33, 49, 64, 65, 80, 81, 129)),
    (60, 1, 2), (60, 47, 6), (60, 49, 130), (60, 513, 34),
    (3, 7, 2048),
]  # fmt: skip


@needs_bfloat16
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_products_are_torchs(wide, m, n, k):
    x, weight = made(m, n, k)
    assert error(wide(x, weight), x, weight) < 4e-3


@needs_bfloat16
def test_a_part_of_a_matrix_is_read_where_it_is(wide):
    x, weight = made(40, 96, 64)
    part = weight[17:60, 10:40]
    rows = x[:, :30].contiguous()
    assert error(wide(rows, part), rows, part) < 4e-3


@needs_bfloat16
@pytest.mark.parametrize(("m", "n", "k"), [(2, 48, 80), (60, 131, 162), (33, 50, 400)])
def test_bytes_and_scales_are_what_widening_gives(compiled, m, n, k):
    x, other = made(m, n, k)
    data, scale = stored(n, k)
    weight = widened(data, scale, *BLOCK, torch.bfloat16)
    assert error(compiled([x, other, data, scale])[1], x, weight) < 4e-3


@needs_bfloat16
def test_not_a_number_stays_in_its_row(wide):
    x, weight = made(20, 50, 64)
    x[3, 5] = float("nan")
    x[7, 9] = float("inf")
    found = wide(x, weight)
    assert found[3].isnan().all() and not found[7].isfinite().any()
    assert found[[r for r in range(20) if r not in (3, 7)]].isfinite().all()


class Counted:
    """In the place of compiled code."""

    def __init__(self):
        self.calls = 0

    def __call__(self, given: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        if len(given) == 3:
            given = [given[0], widened(given[1], given[2], *BLOCK, torch.bfloat16)]
        return [F.linear(*given)]


@pytest.mark.parametrize(
    ("x", "weight", "taken"),
    [
        ((2, 128), (256, 128), True),
        ((3, 5, 128), (256, 128), True),  # any axes in front
        ((1, 128), (256, 128), False),  # one row: the compiled decode step's
        ((0, 128), (256, 128), False),
        ((MOST_ROWS + 1, 128), (256, 128), False),
        ((2, 127), (256, 127), False),  # pairs of numbers are multiplied
        ((2, 8), (8, 8), False),  # too small to matter
    ],
)
def test_which_products_are_taken(x, weight, taken):
    counted = Counted()
    x, weight = torch.randn(x).bfloat16(), torch.randn(weight).bfloat16()
    with FewRows(counted), torch.no_grad():
        found = F.linear(x, weight)
    assert counted.calls == taken and torch.equal(found, F.linear(x, weight))


def test_what_it_does_not_know_is_torchs():
    counted = Counted()
    x, weight = torch.randn(4, 128), torch.randn(256, 128)
    low, across = x.bfloat16(), weight.bfloat16().t().contiguous().t()
    with FewRows(counted), torch.no_grad():
        F.linear(x, weight)  # f32
        F.linear(low, across)  # columns lie together
        F.linear(low.t().contiguous().t(), weight.bfloat16())
        F.linear(low, weight.bfloat16(), torch.zeros(256).bfloat16())  # a bias
        low @ weight.bfloat16().t()
    assert counted.calls == 0


def test_weights_in_bytes_go_to_their_own_code_and_are_widened_without_it():
    data, scale = stored(256, 160)
    weight = nn.Parameter(
        BlockedWeight(
            data, scale, torch.bfloat16, lambda d, s: widened(d, s, *BLOCK, torch.bfloat16)
        ),
        requires_grad=False,
    )
    x, wide, blocked = torch.randn(9, 160).bfloat16(), Counted(), Counted()
    with FewRows(wide, blocked):
        first = F.linear(x, weight)
    with FewRows(wide):
        second = F.linear(x, weight)
    assert (wide.calls, blocked.calls) == (0, 1) and torch.equal(first, second)
