"""Running generated kernels in Triton's interpreter, and compiling them for GPUs.

tests/conftest.py sets TRITON_INTERPRET=1 for every test, so what ``load`` gives runs on tensors of
the CPU, with conversions of floats mended (backends/triton/interpreted.py). ``compile_ahead``
compiles in processes that do not have it, and keeps what it compiled from run to run
(``DSLC_KERNEL_CACHE``).
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from backends.triton import interpreted
from backends.triton.ahead import Binary, compile_ahead
from backends.triton.kernel import Config, Kernel, Operator
from backends.triton.targets import SM_90, Target
from backends.triton.write import kernels_text

interpreted.install()

TILE_OF_WGMMA = 64  # rows of a warpgroup's product


@contextmanager
def load(*operators: Operator) -> Iterator[ModuleType]:
    """The module that ``kernels.py`` of these operators is, interpreted."""
    with TemporaryDirectory() as folder:
        yield load_text(kernels_text(operators, "Under test."), Path(folder))


def load_text(text: str, folder: Path) -> ModuleType:
    path = folder / "kernels_under_test.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


def every(*operators: Operator) -> list[tuple[Kernel, Config]]:
    """Each kernel with each configuration that its launcher may pick."""
    return [(k, config) for op in operators for k in op.kernels for config in k.configs]


def compiles(*operators: Operator, target: Target = SM_90) -> list[Binary]:
    """Compile ahead of time; no spills, shared memory that the GPU has, ``wgmma`` on Hopper.

    A kernel that multiplies matrices in tiles of 64 rows and more (``BLOCK_M``, or ``BLOCK_H``
    where heads are the rows) has to use Hopper's warpgroup instructions.
    """
    binaries = compile_ahead(every(*operators), target)
    for binary in binaries:
        name = f"{binary.kernel.name} ({binary.config.text()}) for {target.name}"
        assert binary.spills == 0, f"{name}: {binary.spills} spills"
        assert binary.stack == 0, f"{name}: {binary.stack} bytes of stack"
        assert binary.shared <= target.shared, f"{name}: {binary.shared} bytes of shared memory"
        constants = binary.config.constants
        rows = constants.get("BLOCK_M", constants.get("BLOCK_H", 0))
        if target is SM_90 and rows >= TILE_OF_WGMMA and "tl.dot" in binary.kernel.source:
            assert binary.warpgroup, f"{name}: {dict(binary.products) or 'no'} products, no wgmma"
    return binaries
