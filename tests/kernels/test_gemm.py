"""Products with stored matrices and parts of them: BF16, block-scaled FP8, FP8 weights alone."""

import re
from dataclasses import replace

import pytest
import torch
from guards import guards
from quantised import E4M3, E4M3_POWERS, WEIGHTS, WEIGHTS_POWERS, dequantise, quantise
from running_kernels import compiles, load
from torch import Tensor

from backends.triton.families.formats import Quantised
from backends.triton.families.gemm import Gemm, generate
from backends.triton.families.tiling import configured
from backends.triton.targets import GFX942, SM_90, SM_100, TARGETS


def part(w: Tensor, spec: Gemm, index: int) -> Tensor:
    """[n, k]: the weights of one part."""
    row, column = spec.row + index * spec.between, spec.column
    if spec.transposed:
        return w[row : row + spec.k, column : column + spec.n].T
    return w[row : row + spec.n, column : column + spec.k]


def check(spec: Gemm, rows: int, target=SM_90, spoil=None, operator=None) -> None:
    """Run it on random operands, and compare with the product of what the codes stand for."""
    torch.manual_seed(0)
    dtype = getattr(torch, spec.dtype)
    a = torch.randn(rows, spec.a_columns).to(dtype)
    w = torch.randn(*spec.matrix).to(dtype)
    if spoil:
        spoil(a, w)
    given, a_meant, w_meant = [a], a.double(), w.double()
    if spec.activations:
        each = [quantise(x, spec.activations) for x in a.split(spec.k, 1)]
        given = [torch.cat([c for c, _ in each], 1), torch.cat([s for _, s in each], 1)]
        a_meant = torch.cat([dequantise(*x, spec.activations) for x in each], 1).double()
    if spec.weights:
        w_codes, w_scales = quantise(w, spec.weights)
        given += [w_codes, w_scales]
        w_meant = dequantise(w_codes, w_scales, spec.weights).double()
    else:
        given += [w]
    operator = operator or generate(spec, target)
    with load(operator) as kernels, guards() as guarded:
        out = getattr(kernels, operator.name)(*(guarded(x) for x in given))
    assert out.shape == (rows, spec.parts * spec.n)
    assert out.dtype == getattr(torch, spec.out)
    columns = a_meant.split(spec.k, 1) if spec.own else [a_meant] * spec.parts
    expected = torch.cat([x @ part(w_meant, spec, i).T for i, x in enumerate(columns)], 1)
    near = {"float32": 1e-5, "bfloat16": 2**-8}[spec.out]
    torch.testing.assert_close(
        out.double(), expected, rtol=near, atol=near * spec.k**0.5, equal_nan=True
    )


FP8 = {"weights": WEIGHTS, "activations": E4M3}
FP8_POWERS = {"weights": WEIGHTS_POWERS, "activations": E4M3_POWERS}
BY = {"weights": WEIGHTS}
KINDS = {"bf16": {}, "fp8": FP8, "fp8_powers": FP8_POWERS, "fp8_weights": BY}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 17, 65, 300])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (130, 300), (320, 144)])
def test_product(kind: str, rows: int, n: int, k: int) -> None:
    check(Gemm(n, k, **KINDS[kind]), rows)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_heads(kind: str, rows: int) -> None:
    """Heads of 192 rows, 64 of each: a head starts in the middle of a tile of scales."""
    spec = Gemm(64, 256, parts=3, stored=(576, 256), row=128, step=192, **KINDS[kind])
    check(spec, rows)
    check(Gemm(128, 256, parts=3, stored=(576, 256), step=192, **KINDS[kind]), rows)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_and_some_columns(kind: str, rows: int) -> None:
    check(Gemm(64, 128, stored=(576, 384), row=512, column=128, **KINDS[kind]), rows)
    check(Gemm(100, 200, stored=(576, 456), row=37, column=256, **KINDS[kind]), rows)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_with_columns_of_their_own(kind: str, rows: int) -> None:
    heads = Gemm(96, 128, 3, own=True, stored=(768, 128), row=128, step=256, **KINDS[kind])
    check(heads, rows)
    check(Gemm(40, 48, parts=2, own=True, **KINDS[kind]), rows)


def test_places_in_a_matrix_of_over_2_to_the_31_numbers() -> None:
    """A step along K is a whole row of it: from 2^31 numbers on an int32 does not hold it."""
    for rows, marks in ((1 << 18, 1), ((1 << 18) - 64, 0)):
        (thin,) = generate(Gemm(8192, rows, transposed=True), SM_90).kernels
        assert thin.source.count("k * BLOCK_K * tl.full((), 8192, tl.int64)") == marks


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("kind", ["bf16", "fp8_weights"])
def test_transposed(kind: str, rows: int) -> None:
    """What absorbing a matrix into queries takes: stored rows are summed, head by head."""
    check(Gemm(320, 128, parts=2, own=True, transposed=True, step=256, **KINDS[kind]), rows)
    check(Gemm(72, 64, parts=3, own=True, transposed=True, row=128, step=192, **KINDS[kind]), rows)
    check(Gemm(130, 100, transposed=True, **KINDS[kind]), rows)


def test_other_tiles() -> None:
    fine = Quantised("float8_e4m3fn", "float8_e8m0fnu", 1, 32, "exponents")
    check(Gemm(70, 200, weights=fine, activations=fine), 66)
    check(Gemm(70, 200, weights=fine, activations=fine), 3)
    large = Quantised("float8_e4m3fn", "float32", 256, 256)
    check(Gemm(300, 520, weights=large, activations=E4M3), 66)


@pytest.mark.parametrize("kind", KINDS)
def test_k_is_shared_by_programs(kind: str) -> None:
    """The last of the programs that share a tile adds their sums, and leaves nothing behind."""
    spec = Gemm(96, 4000, **KINDS[kind])
    few = generate(spec, SM_90).kernels[0]
    assert all(config.constants["SPLIT"] > 1 for config in few.configs[:3])
    for rows in (1, 20, 64):
        check(spec, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate(kind: str) -> None:
    """The last tile of 300 columns is partial for each of them, and may have no right half."""
    spec = Gemm(300, 272, **KINDS[kind])
    operator = generate(spec, SM_90)
    for i, kernel in enumerate(operator.kernels):
        for candidate in kernel.candidates:
            kernels = list(operator.kernels)
            kernels[i] = replace(kernel, configs=(candidate,))
            one = replace(operator, kernels=tuple(kernels))
            check(spec, 300 if i else 60, operator=one)


def test_float32_out() -> None:
    check(Gemm(70, 200, out="float32"), 66)
    check(Gemm(70, 200, out="float32", **FP8), 3)


@pytest.mark.parametrize("rows", [4, 70])
def test_nan_and_zeros_stay_in_their_rows(rows: int) -> None:
    def spoil(a: Tensor, w: Tensor) -> None:
        a[0, 5], a[1, 130] = float("nan"), float("inf")
        a[2] = 0
        w[:128, :128] = 0

    check(Gemm(130, 300, **FP8), rows, spoil=spoil)


@pytest.mark.parametrize("target", [SM_100, GFX942], ids=lambda t: t.name)
def test_other_gpus_take_other_tiles(target) -> None:
    check(Gemm(130, 256), 70, target)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 64, 100, 7168])
def test_every_gpu_has_tiles_for_every_width(target, kind: str, n: int) -> None:
    if kind.startswith("fp8") and not target.fp8:
        return
    for kernel in generate(Gemm(n, 512, **KINDS[kind]), target).kernels:
        assert kernel.configs and set(kernel.configs[-1].constants) <= set(parameters(kernel))


def parameters(kernel) -> list[str]:
    return re.findall(r"(\w+): tl.constexpr[,\n]", kernel.source)


def test_what_has_no_kernel() -> None:
    with pytest.raises(ValueError, match="what is summed does not start on a tile of 128 x 128"):
        Gemm(64, 64, stored=(64, 512), column=72, **FP8)
    with pytest.raises(ValueError, match="a matrix of 64 x 512 has no such part"):
        Gemm(64, 512, stored=(64, 512), column=128)
    with pytest.raises(ValueError, match="gfx942 has no float8_e4m3fn"):
        generate(Gemm(64, 64, **FP8), GFX942)


LARGE = [(7168, 16384), (4096, 7168), (7168, 2048), (1536, 7168), (2112, 7168), (24576, 1536)]
LARGE += [(32768, 512), (18432, 7168), (129280, 7168)]


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8_weights"])
def test_traffic_is_near_the_bound(kind: str) -> None:
    for n, k in LARGE:
        operator = generate(Gemm(n, k, **KINDS[kind]), SM_90)
        for rows in (1, 16, 64, 128, 256, 512, 4096):
            if kind == "fp8_weights" and rows > 256:
                continue  # a kernel for decoding
            cost = operator.traffic({"tokens": rows})
            assert cost.flops == 2 * rows * n * k
            assert cost.bytes <= 1.2 * cost.bound, (n, k, rows)


def test_few_rows_keep_the_gpu_busy() -> None:
    """12 tiles of 128 x 128 would leave 120 of 132 processors idle."""
    few = generate(Gemm(1536, 7168, **FP8), SM_90).kernels[0]
    for rows in (1, 16, 64, 128):
        given = configured(few, rows).constants
        tiles = -(-1536 // given["BLOCK_N"]) * -(-rows // given["BLOCK_M"])
        assert tiles * given["SPLIT"] >= 96, rows


REAL = [Gemm(*LARGE[0], **FP8), Gemm(2112, 7168, **FP8_POWERS), Gemm(7168, 2048)]
ODD = [
    Gemm(130, 300, **FP8),
    Gemm(64, 512, parts=4, stored=(768, 512), row=128, step=192, **FP8),
    Gemm(128, 512, parts=4, own=True, stored=(1024, 512), row=128, step=256, **BY),
    Gemm(512, 128, parts=4, own=True, transposed=True, step=256, **BY),
]


def test_compiles_for_hopper() -> None:
    """No spills, and 8-bit or 16-bit warpgroup products in every kernel."""
    binaries = compiles(*(generate(spec, SM_90) for spec in [*REAL, *ODD]))
    for binary in binaries:
        product = "QGMMA" if "a_scales" in binary.kernel.source else "HGMMA"
        assert binary.products.get(product), binary.kernel.name


def test_compiles_for_others() -> None:
    blackwell = [Gemm(7168, 2048, **FP8)]
    compiles(*(generate(spec, SM_100) for spec in blackwell), target=SM_100)
    compiles(generate(Gemm(130, 300), GFX942), target=GFX942)
