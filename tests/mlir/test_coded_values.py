"""Quantising in a module, and of weights in numpy, is what ``compiler/numerics.py`` says, for every
declared format whose codes fit into a byte."""

import numpy as np
import pytest
import torch

from backends.mlir.coded import represented
from backends.mlir.coding import NoCodes, element_of, quantised
from backends.mlir.linalg import Linalg
from backends.mlir.packed import product
from backends.mlir.step import INNER, LANES, OUTER, TILE
from backends.mlir.values import Axis, Code, Size, Value
from backends.mlir.weights import _e4m3
from backends.pytorch.runtime.fp8 import quantised_matrix
from compiler import numerics
from compiler.coding import Coding
from dsl.program import open_program

FORMATS = open_program("dsv3").formats
# (format, rows and columns of a tile)
CODINGS = {
    "e4m3": (1, 128), "e5m2": (1, 7), "mxfp8": (1, 32), "e4m3_ue8m0": (1, 5), "e2m1": (1, 16),
    "mxfp4": (1, 32), "int8": (1, None), "int4": (1, 12),
}  # fmt: skip


def coding(name: str, rows: int | None, columns: int | None) -> Coding:
    return Coding(FORMATS[name], rows, columns)


def awkward(rows: int, columns: int) -> np.ndarray:
    """Rows of all magnitudes; of zeros, tiny ones, ties, infinities and what is no number."""
    found = np.random.default_rng(3).normal(size=(rows, columns)).astype(np.float32)
    found *= np.exp2(np.arange(rows, dtype=np.float32) * 3 - 20)[:, None]
    found[1] = 0
    found[2] *= np.float32(1e-30)
    found[3] = (np.arange(columns) - columns // 2) * np.float32(0.0625)  # ties
    found[4, 3], found[5, 0], found[6, columns - 1] = np.nan, np.inf, -np.inf
    return found


@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize(
    "shape, tile", [((37, 45), (16, 16)), ((9, 40), (128, 128)), ((33,), (1, 8))]
)
def test_a_weight_is_quantised_as_in_torch(
    name: str, shape: tuple[int, ...], tile: tuple[int, int]
) -> None:
    weight = awkward(37, 45)[: shape[0], : shape[-1]] if len(shape) > 1 else awkward(37, 33)[7]
    found, scales = quantised(np.ascontiguousarray(weight), coding(name, *tile))
    matrix = torch.from_numpy(weight)[None] if len(shape) == 1 else torch.from_numpy(weight)
    codes, expected = quantised_matrix(matrix.contiguous(), coding(name, *tile))
    np.testing.assert_array_equal(scales, expected.numpy())
    spread = np.isnan(numerics._spread(expected, matrix.shape, coding(name, *tile)).numpy())
    theirs = codes.contiguous().view(torch.uint8).numpy()
    assert (np.where(spread, 0, found.reshape(matrix.shape)) == np.where(spread, 0, theirs)).all()


def compiled(text: str):
    """The functions of a module of one's own."""
    compiler = pytest.importorskip("iree.compiler")
    runtime = pytest.importorskip("iree.runtime")
    binary = compiler.compile_str(
        text, target_backends=["llvm-cpu"], extra_args=["--iree-llvmcpu-target-cpu=host"]
    )
    config = runtime.Config("local-task")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, binary))
    return context.modules.module


def function(name: str, arguments: list[Value], body) -> str:
    code = Code()
    found = body(Linalg(code))
    given = ", ".join(f"{v.name}: {v.type}" for v in arguments)
    code.add(f"return {found.name} : {found.type}")
    return "\n".join([f"  func.func @{name}({given}) -> {found.type} {{", *code.text(), "  }"])


def test_quantising_in_a_module() -> None:
    """Each row by itself, with a partial tile at its end: to the last bit, but that IREE takes
    numbers below 2^-126 for 0, scales among them (57344 times that is E5M2's)."""
    rows, columns = 23, 133
    x = Value("%x", (Axis("t", rows), Axis("d", columns)), "f32")
    tiles = {name: coding(name, *tile).along("d") for name, tile in CODINGS.items()}
    text = [function(n, [x], lambda ops, c=c: represented(ops, x, c)) for n, c in tiles.items()]
    module = compiled("\n".join(["module {", *text, "}"]))
    given = awkward(rows, columns)
    for name, tile in tiles.items():
        found = np.asarray(module[name](given).to_host())
        codes, scales = numerics.quantised(torch.from_numpy(given), tile)
        expected = torch.where(scales.isnan(), scales, codes * scales).numpy()
        # IREE takes numbers below 2^-126 for 0.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-33, err_msg=name)


@pytest.mark.parametrize("name", ["nvfp4", "bf16", "f16", "ue8m0"])
def test_formats_without_codes_of_a_byte(name: str) -> None:
    with pytest.raises(NoCodes) as error:
        element_of(coding(name, 1, 16))
    assert str(error.value) == (
        "the scales of 'nvfp4' have a scale of their own"
        if name == "nvfp4"
        else f"codes of '{name}' do not fit into a byte that IREE computes with"
    )


def test_a_product_with_packed_codes() -> None:
    """Every code, subnormal and NaN included, times its scale; one row, several, and none."""
    outer, columns, tiles = 4, 64, 4
    w = Value(
        "%w",
        (Axis(OUTER.format("o"), outer), Axis("k", columns), Axis(INNER.format("o"), LANES)),
        "f8E4M3FN",
    )
    s = Value("%s", (w.axes[0], Axis(TILE, tiles)), "f32")
    weight = Value(w.name, w.axes, w.element, scales=s)

    def multiplied(name: str, rows: Size) -> str:
        x = Value("%x", (Axis("t", rows), Axis("k", columns)), "f32")

        def body(ops: Linalg) -> Value:
            if isinstance(rows, str):
                ops.code.index(0)
                ops.code.add(f"{rows} = tensor.dim %x, %c0 : {x.type}")
            return product(ops, x, weight, [x.axes[0], w.axes[0], w.axes[2]], "f32")

        return function(name, [x, w, s], body)

    module = compiled("\n".join(["module {", multiplied("one", 1), multiplied("any", "%n"), "}"]))
    codes = np.arange(outer * columns * LANES).astype(np.uint8).reshape(outer, columns, LANES)
    scales = np.random.default_rng(0).random((outer, tiles)).astype(np.float32)
    wide = _e4m3()[codes].reshape(outer, tiles, -1, LANES) * scales[..., None, None]
    runtime = pytest.importorskip("iree.runtime")
    buffer = runtime.get_device("local-task").allocator.allocate_buffer_copy(
        memory_type=runtime.MemoryType.DEVICE_LOCAL,
        allowed_usage=runtime.BufferUsage.DEFAULT,
        device=runtime.get_device("local-task"),
        buffer=codes,
        element_type=runtime.HalElementType.FLOAT_8_E4M3_FN,
    )
    for rows in (1, 5, 0):
        x = np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32)
        x[:, (codes & 127 == 127).any((0, 2))] *= 0
        found = module["one" if rows == 1 else "any"](x, buffer, scales)
        found = np.asarray(found.to_host()).reshape(rows, outer, LANES)
        expected = np.einsum("tk,okl->tol", x, wide.reshape(outer, columns, LANES))
        assert np.isnan(expected).any() or not rows
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
