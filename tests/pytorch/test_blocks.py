"""Weights in E4M3 with a scale for each block: the C that compiled pieces hold, against torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from backends.pytorch.ahead.blocks import (
    BlockedWeight,
    Blocks,
    NeedsWide,
    rows_of_blocks,
    widened,
)
from backends.pytorch.ahead.build import packaged
from backends.pytorch.weights.fill import dequantise

BLOCK = (128, 128)
ODD = (48, 80)  # scalar code where a block's columns are no multiple of 64


class All(nn.Module):
    """Every function of ``blocks.h``, in each of its forms."""

    def forward(self, x: Tensor, data: Tensor, scale: Tensor, odd: Tensor, pick: Tensor) -> list:
        low = x.bfloat16()
        return [
            rows_of_blocks(low, data, scale, pick, *BLOCK),
            rows_of_blocks(x, data, scale, pick, *BLOCK),
            rows_of_blocks(low, data, odd, pick, *ODD),
            widened(data[0], scale[0], *BLOCK, torch.bfloat16),
            widened(data[0], scale[0], *BLOCK, torch.float32),
            widened(data[0], odd[0], *ODD, torch.bfloat16),
        ]


def made(matrices: int, n: int, k: int, count: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (matrices, n, k), generator=generator).to(torch.uint8)
    data[data & 0x7F == 0x7F] = 0  # NaN
    x = torch.randn(count, k, generator=generator)
    scales = [
        torch.rand(matrices, -(-n // rows), -(-k // columns), generator=generator) / 100
        for rows, columns in (BLOCK, ODD)
    ]
    pick = torch.randint(matrices, (count,), generator=generator)
    return x, data, *scales, pick


def compiled_code(folder: Path, *examples: Tensor):
    """``All`` as machine code, for operands of any size; what is 1 in the examples stays 1."""
    sizes = [dict.fromkeys(range(x.ndim), Dim.AUTO) for x in examples]
    program = torch.export.export(All(), examples, dynamic_shapes=tuple(sizes), strict=False)
    path = folder / "all.pt2"
    path.write_bytes(packaged(program))
    return torch._inductor.aoti_load_package(str(path))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_code(tmp_path_factory.mktemp("many"), *made(3, 200, 300, 4))


@pytest.fixture(scope="module")
def compiled_for_one(tmp_path_factory):
    """A row and a matrix: what most weights of a decode step are multiplied with."""
    return compiled_code(tmp_path_factory.mktemp("one"), *made(1, 200, 300, 1))


@pytest.mark.parametrize(
    ("matrices", "n", "k", "count"),
    [
        (2, 16, 64, 3),
        (3, 17, 65, 2),
        (2, 130, 129, 3),
        (4, 257, 449, 2),
        (1, 2, 3, 1),
        (1, 16, 64, 1),
        (1, 130, 449, 1),
    ],
)
def test_every_form_is_what_torch_gives(compiled, compiled_for_one, matrices, n, k, count):
    given = made(matrices, n, k, count)
    run = compiled_for_one if count == 1 else compiled
    for found, expected in zip(run(*given), All()(*given), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error <= (1e-2 if found.dtype == torch.bfloat16 else 1e-5)


def test_every_number_there_is(compiled):
    data = torch.arange(256, dtype=torch.uint8).repeat(2, 64, 1)[:, :, :256].contiguous()
    ones, odd = torch.ones(2, 1, 2), torch.ones(2, 2, 4)
    x, pick = torch.zeros(2, 256), torch.tensor([0, 1])
    expected = data[0].view(torch.float8_e4m3fn).float()
    for wide in compiled(x, data, ones, odd, pick)[3:]:
        assert torch.equal(torch.nan_to_num(wide.float(), 999), torch.nan_to_num(expected, 999))


def test_widened_is_what_loading_a_checkpoint_without_gives(compiled):
    x, data, scale, odd, pick = made(2, 130, 200, 2)
    into = torch.empty(130, 200, dtype=torch.bfloat16)
    dequantise(data[0].view(torch.float8_e4m3fn), scale[0], BLOCK, into)
    assert torch.equal(compiled(x, data, scale, odd, pick)[3], into)


def test_under_vmap_each_row_picks_its_matrix():
    x, data, scale, _, pick = made(3, 20, 30, 5)
    one = torch.vmap(lambda x, p: rows_of_blocks(x[None], data, scale, p[None], *BLOCK)[0], (0, 0))
    assert torch.equal(one(x, pick), rows_of_blocks(x, data, scale, pick, *BLOCK))


def test_whatever_else_is_done_with_one_in_a_trace_needs_it_wide():
    _, data, scale, _, _ = made(1, 20, 30, 1)
    weight = Blocks("layers.0.W", data[0], scale[0], BLOCK)
    for use in (
        lambda w: w.unflatten(0, (4, 5)),
        lambda w: w[:3],
        lambda w: torch.einsum("nk,k->n", w, torch.ones(30)),
        lambda w: torch.ones(2, 20) @ w,
    ):
        with pytest.raises((NeedsWide, TypeError)) as raised:
            use(weight)
        assert isinstance(raised.value, NeedsWide) and raised.value.path == "layers.0.W"


def test_a_parameter_reads_as_the_wide_weight_and_cannot_be_written():
    _, data, scale, _, _ = made(1, 20, 30, 1)

    def widen(data: Tensor, scale: Tensor) -> Tensor:
        return widened(data, scale, *BLOCK, torch.bfloat16)

    weight = nn.Parameter(
        BlockedWeight(data[0], scale[0], torch.bfloat16, widen), requires_grad=False
    )
    wide = widen(data[0], scale[0])
    assert weight.dtype == torch.bfloat16 and weight.shape == (20, 30)
    assert torch.equal(weight.float(), wide.float())
    x = torch.randn(4, 30).bfloat16()
    assert torch.equal(nn.functional.linear(x, weight), x @ wide.T)
    with pytest.raises(RuntimeError, match="a weight that is kept in FP8 cannot be written to"):
        weight.zero_()


def test_the_code_ships_with_the_package():
    import backends.pytorch.ahead as ahead

    assert os.path.exists(Path(ahead.__file__).with_name("blocks.h"))
