"""What launchers ask of a GPU: grids within its limits, at sizes that no interpreter can run."""

import pytest
import torch
from quantised import E4M3, WEIGHTS
from running_kernels import load
from torch import Tensor

from backends.triton.families import gated, gemm, grouped_gemm, quantise, rms_norm
from backends.triton.kernel import Operator
from backends.triton.targets import SM_90

ROWS = 300_000  # more than 65,535, the limit of a grid's second and third axis
FP8 = {"weights": WEIGHTS, "activations": E4M3}


class Grids(list):
    """In place of a kernel: the grids it is launched with."""

    def __getitem__(self, grid):
        return lambda *args, **config: self.append(grid)


def grids(operator: Operator, *given: Tensor) -> list[tuple[int, ...]]:
    found = Grids()
    with load(operator) as kernels:
        for kernel in operator.kernels:
            setattr(kernels, kernel.name, found)
        getattr(kernels, operator.name)(*given)
    return list(found)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def codes(rows: int, k: int) -> tuple[Tensor, Tensor]:
    scales = empty(rows, -(-k // 128), dtype=torch.float32)
    return empty(rows, k, dtype=torch.float8_e4m3fn), scales


def weights(n: int, k: int, *more: int) -> tuple[Tensor, Tensor]:
    scales = empty(*more, -(-n // 128), -(-k // 128), dtype=torch.float32)
    return empty(*more, n, k, dtype=torch.float8_e4m3fn), scales


CASES = {
    "quantise": (quantise.generate(quantise.Quantise(7168, E4M3), SM_90), (empty(ROWS, 7168),)),
    "norm": (
        rms_norm.generate(rms_norm.RMSNorm(7168, 1e-6, to=E4M3), SM_90),
        (empty(ROWS, 7168), empty(7168)),
    ),
    "gated": (
        gated.generate(gated.Gated(2048, to=E4M3), SM_90),
        (empty(ROWS, 2048), empty(ROWS, 2048)),
    ),
    "gemm": (
        gemm.generate(gemm.Gemm(129280, 7168, **FP8), SM_90),
        (*codes(ROWS, 7168), *weights(129280, 7168)),
    ),
    "few rows": (
        gemm.generate(gemm.Gemm(129280, 7168, **FP8), SM_90),
        (*codes(1, 7168), *weights(129280, 7168)),
    ),
    "heads": (
        gemm.generate(
            gemm.Gemm(512, 128, 128, own=True, transposed=True, step=256, weights=WEIGHTS), SM_90
        ),
        (empty(ROWS, 128 * 128), *weights(128 * 256, 512)),
    ),
    "experts": (
        grouped_gemm.generate(grouped_gemm.GroupedGemm(256, 4096, 7168, **FP8), SM_90),
        (*codes(ROWS, 7168), *weights(4096, 7168, 256), empty(257, dtype=torch.int32)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_grids(case: str) -> None:
    found = grids(*CASES[case][:1], *CASES[case][1])
    assert len(found) == 1
    first, *rest = found[0]
    assert 0 < first < 2**31 and all(0 < axis <= 65_535 for axis in rest)


def test_descriptors_have_memory() -> None:
    """Triton has none of its own: a launch of a kernel with descriptors would fail."""
    wide = gemm.generate(gemm.Gemm(256, 256), SM_90)
    assert "tl.make_tensor_descriptor" in wide.kernels[1].source
    assert "triton.set_allocator(scratch)" in wide.launcher
    odd = gemm.generate(gemm.Gemm(250, 250), SM_90)
    assert "tl.make_tensor_descriptor" not in odd.kernels[1].source
    assert "scratch" not in odd.launcher
