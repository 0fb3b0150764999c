"""The module as text: as long for 61 layers as for 4, in every dialect, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

import dslc
from backends.mlir.emit import torch_step
from backends.mlir.module import lower
from backends.pytorch.weights.random_values import values
from compiler.errors import UserError
from compiler.tensors import Pattern, caches
from dsl.files import shipped_models
from dslc.program import Program
from mlir.compiled import ODD, difference

pytest.importorskip("iree.compiler")

DIALECTS = {"torch": "torch.aten.", "linalg": "linalg.generic", "stablehlo": "stablehlo.",
            "tosa": "tosa."}  # fmt: skip


def program(name: str = "dsv3", **changes: int) -> Program:
    return dslc.compile(name, dims="small", set={**ODD.get(name, {}), **changes})


def text(program: Program, element: str = "f32") -> str:
    compiled = program.compiled
    return lower(compiled.program, caches(compiled.after("elaborate")), element).text


def test_neither_layers_nor_blocks_make_the_text_longer() -> None:
    few, many = (text(program(layers=n)).count("\n") for n in (4, 61))
    assert many - few <= 2  # a constant or two
    few, many = (text(program(experts=n, groups=4)).count("\n") for n in (128, 256))
    assert many - few <= 2


REFUSED = {"qwen3_next"}  # it has recurrences


@pytest.mark.parametrize("name", sorted({*shipped_models()} - {"clusters"} - REFUSED))
def test_dialects(name: str) -> None:
    """Every shipped model in every dialect; ``mlir`` verifies a module, and parses what it
    printed."""
    pytest.importorskip("torch_mlir")
    small = program(name, layers=1)
    for dialect, sign in DIALECTS.items():
        found = small.mlir(dialect)
        assert sign in found and "bf16" not in found
        assert "torch.aten." not in found or dialect == "torch"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_in_bfloat16(dialect: str) -> None:
    pytest.importorskip("torch_mlir")
    assert "bf16" in program("llama3", layers=1).mlir(dialect, "bfloat16")


def test_a_text_that_is_wrong_is_refused() -> None:
    """The verifier that the texts go through sees a wrong type."""
    from iree.compiler import ir

    wrong = text(program()).replace("tensor<?x?xi64>", "tensor<?x?xf32>", 1)
    with ir.Context(), pytest.raises(ir.MLIRError):
        ir.Module.parse(wrong)


def test_the_torch_dialect_means_the_same(tmp_path: Path) -> None:
    """Compiled by way of torch-mlir, a step gives the PyTorch backend's logits."""
    from iree import compiler, runtime

    small, tokens = program(layers=2), 5
    code, weights = torch_step(small.compiled.program, "f32", tokens)
    binary = compiler.compile_str(
        code,
        input_type="torch",
        target_backends=["llvm-cpu"],
        extra_args=["--iree-llvmcpu-target-cpu=host"],
    )
    config = runtime.Config("local-task")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, binary))
    small.save(tmp_path / "small")
    given = np.random.default_rng(0).integers(0, ODD["dsv3"]["vocab"], (1, tokens))
    with torch.no_grad():
        expected = dslc.load(tmp_path / "small", seed=0)(torch.tensor(given))[0].numpy()
    found = context.modules.module["step"](given, *map(drawn, weights.values()))
    assert difference(found.to_host(), expected) <= 1e-5


def drawn(pattern: Pattern) -> np.ndarray:
    """The random weights of a pattern, stacked."""
    each = [values(tensor, 0) for tensor in pattern.tensors()]
    return np.concatenate(each).reshape(*map(len, pattern.ranges), *pattern.shape)


def test_an_op_without_a_lowering_is_refused_with_its_line() -> None:
    with pytest.raises(UserError) as error:
        text(program("qwen3_next"))
    assert str(error.value) == (
        "models/qwen3_next.arch:98: the MLIR backend cannot compile 'scan' (state = body(state, "
        "operands...) for each token, kept between steps; gives the states, or what `read` makes "
        "of each); --backend pytorch can"
    )
