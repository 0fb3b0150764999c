"""The interpreter converts floats as torch does, and saturates where GPUs do."""

import pytest
import torch
from running_kernels import load_text

COPY = """
import triton
import triton.language as tl

@triton.jit
def copy(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_rounds_to_nearest_even(dtype, tmp_path) -> None:
    torch.manual_seed(0)
    scale = torch.logspace(-8, 2, 4096)
    x = torch.cat([torch.randn(4096) * scale, torch.arange(-2048, 2048) / 16]).clamp(-448, 448)
    y = torch.empty(8192, dtype=dtype)
    load_text(COPY, tmp_path).copy[(1,)](x, y, N=8192)
    assert torch.equal(y.float(), x.to(dtype).float())


def test_eight_bits_saturate_and_keep_nan(tmp_path) -> None:
    x = torch.tensor([1e9, -1e9, float("inf"), float("nan")])
    y = torch.empty(4, dtype=torch.float8_e4m3fn)
    load_text(COPY, tmp_path).copy[(1,)](x, y, N=4)
    assert y.float().tolist()[:3] == [448, -448, 448]
    assert y.float()[3].isnan()


PRODUCT = """
import triton
import triton.language as tl

@triton.jit
def product(x, y, z, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(z + at, tl.dot(tl.load(x + at), tl.load(y + at)))
"""


def test_products_of_bfloat16_are_products_of_numbers(tmp_path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 16, 16).bfloat16()
    z = torch.empty(16, 16)
    load_text(PRODUCT, tmp_path).product[(1,)](x, y, z, N=16)
    torch.testing.assert_close(z, x.float() @ y.float())


WHOLE = """
import triton
import triton.language as tl

@triton.jit
def there_and_back(x, y, back, N: tl.constexpr):
    at = tl.arange(0, N)
    narrow = tl.load(x + at).to(tl.bfloat16)
    tl.store(y + at, narrow)
    tl.store(back + at, narrow.to(tl.int32))
"""


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_become_bfloat16_and_are_again(dtype, tmp_path) -> None:
    x = torch.tensor([0, 1, 2, 200]).to(dtype)
    y, back = torch.empty(4, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int32)
    load_text(WHOLE, tmp_path).there_and_back[(1,)](x, y, back, N=4)
    assert torch.equal(y, x.to(torch.bfloat16)) and torch.equal(back, x.to(torch.int32))
