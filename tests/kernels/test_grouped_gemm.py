"""Products of tokens with the matrices of their experts, however unevenly they are routed."""

from itertools import pairwise

import pytest
import torch
from guards import guards
from quantised import E4M3, E4M3_POWERS, WEIGHTS, WEIGHTS_POWERS, dequantise, quantise
from running_kernels import compiles, load
from torch import Tensor

from backends.triton.families.grouped_gemm import GroupedGemm, generate
from backends.triton.targets import GFX942, SM_90, SM_100

FP8 = {"weights": WEIGHTS, "activations": E4M3}
FP8_POWERS = {"weights": WEIGHTS_POWERS, "activations": E4M3_POWERS}
KINDS = {"bf16": {}, "fp8": FP8, "fp8_powers": FP8_POWERS, "fp8_weights": {"weights": WEIGHTS}}


def weights(spec: GroupedGemm) -> tuple[list[Tensor], Tensor]:
    """What is passed, and what it stands for."""
    w = torch.randn(spec.experts, spec.n, spec.k).to(getattr(torch, spec.dtype))
    if spec.weights is None:
        return [w], w.double()
    each = [quantise(x, spec.weights) for x in w]
    meant = torch.stack([dequantise(*x, spec.weights) for x in each]).double()
    return [torch.stack([c for c, _ in each]), torch.stack([s for _, s in each])], meant


def tokens(spec: GroupedGemm, x: Tensor) -> tuple[list[Tensor], Tensor]:
    if spec.activations is None:
        return [x], x.double()
    codes, scales = quantise(x.flatten(0, -2), spec.activations)
    meant = dequantise(codes, scales, spec.activations).double().view(x.shape)
    return [codes.view(x.shape), scales.view(*x.shape[:-1], scales.shape[-1])], meant


def near(out: Tensor, expected: Tensor, spec: GroupedGemm) -> None:
    step = 2**-8
    torch.testing.assert_close(
        out.double(), expected, rtol=step, atol=step * spec.k**0.5, equal_nan=True
    )


def check_contiguous(spec: GroupedGemm, counts: list[int], spare: int = 0) -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    x = torch.randn(sum(counts) + spare, spec.k).to(getattr(torch, spec.dtype))
    x[sum(counts) :] = float("nan")  # rows of no expert
    (a, a_meant), (w, w_meant) = tokens(spec, x), weights(spec)
    operator = generate(spec, SM_90)
    with load(operator) as kernels, guards() as guarded:
        out = getattr(kernels, operator.name)(*(guarded(x) for x in (*a, *w, offsets)))
    assert out.shape == (len(x), spec.n)
    for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
        near(out[start:end], a_meant[start:end] @ w_meant[expert].T, spec)


def check_masked(spec: GroupedGemm, counts: list[int], expected: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(spec.experts, spec.capacity, spec.k).to(getattr(torch, spec.dtype))
    for expert, count in enumerate(counts):
        x[expert, count:] = float("nan")  # not tokens
    (a, a_meant), (w, w_meant) = tokens(spec, x), weights(spec)
    operator = generate(spec, SM_90)
    with load(operator) as kernels, guards() as guarded:
        given = [guarded(x) for x in (*a, *w, torch.tensor(counts).int())]
        out = getattr(kernels, operator.name)(*given, expected)
    assert out.shape == (spec.experts, spec.capacity, spec.n)
    for expert, count in enumerate(counts):
        near(out[expert, :count], a_meant[expert, :count] @ w_meant[expert].T, spec)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "counts",
    [[0, 1, 0, 17, 3], [300, 0, 130, 5, 64], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    ids=str,
)
def test_contiguous(kind: str, counts: list[int]) -> None:
    check_contiguous(GroupedGemm(5, 130, 272, **KINDS[kind]), counts)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_no_expert(kind: str) -> None:
    check_contiguous(GroupedGemm(3, 64, 100, **KINDS[kind]), [2, 0, 7], spare=5)
    check_contiguous(GroupedGemm(3, 64, 100, **KINDS[kind]), [90, 0, 70], spare=9)


def test_one_expert() -> None:
    check_contiguous(GroupedGemm(1, 320, 128, **FP8), [200])
    check_contiguous(GroupedGemm(1, 320, 128, **FP8), [3])


def test_more_tiles_down_than_a_group() -> None:
    check_contiguous(GroupedGemm(2, 272, 64, **FP8), [1300, 40])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expected", [None, 2])
@pytest.mark.parametrize("counts", [[0, 3, 40, 1], [0, 0, 0, 0], [40, 40, 40, 40]], ids=str)
def test_masked(kind: str, expected: int | None, counts: list[int]) -> None:
    check_masked(GroupedGemm(4, 130, 272, capacity=40, **KINDS[kind]), counts, expected)


REAL = [(4096, 7168), (7168, 2048)]


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_traffic_is_near_the_bound(kind: str) -> None:
    for n, k in REAL:
        prefill = generate(GroupedGemm(256, n, k, **KINDS[kind]), SM_90)
        few = generate(GroupedGemm(9, n, k, **KINDS[kind]), SM_90)
        decode = generate(GroupedGemm(256, n, k, capacity=128, **KINDS[kind]), SM_90)
        for each in (1, 16, 32, 128, 512, 4096):
            for operator, experts in ((prefill, 256), (few, 9), (decode, 256)):
                cost = operator.traffic({"tokens": each * experts})
                assert cost.flops == 2 * each * experts * n * k
                assert cost.bytes <= 1.2 * cost.bound, (operator.name, each)


def test_compiles_for_hopper() -> None:
    """No spills, and warpgroup products in every kernel; matrices of 7.5 GB in all."""
    specs = [GroupedGemm(256, *REAL[0], **FP8), GroupedGemm(9, *REAL[1])]
    specs += [
        GroupedGemm(256, *REAL[1], capacity=64, **FP8_POWERS),
        GroupedGemm(5, 130, 300, **FP8),
    ]
    binaries = compiles(*(generate(spec, SM_90) for spec in specs))
    for binary in binaries:
        product = "QGMMA" if "a_scales" in binary.kernel.source else "HGMMA"
        assert binary.products.get(product), binary.kernel.name


def test_compiles_for_others() -> None:
    compiles(generate(GroupedGemm(256, *REAL[0], **FP8), SM_100), target=SM_100)
    compiles(generate(GroupedGemm(256, *REAL[1]), GFX942), target=GFX942)
