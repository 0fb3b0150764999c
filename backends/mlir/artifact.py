"""The files of a compiled module, and what stands in them: written by a compiler, read without one.

``module.mlir`` is the module as text, ``module.vmfb`` what IREE made of it, and ``module.json``
says what both need: the stacked weights by name, with the checkpoint's tensors that they are made
of, and the caches in the order of the functions' arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from backends.mlir.step import ENTRY, LANES, Weights
from backends.mlir.values import Element, Unsupported
from backends.pytorch.ahead.processor import features
from compiler.errors import UserError
from compiler.ir import Program
from compiler.manifest import Manifest, ManifestError
from compiler.tensors import CachePattern, Pattern

if TYPE_CHECKING:
    from backends.mlir.module import Module

TEXT, BYTES, LAYOUT = "module.mlir", "module.vmfb", "module.json"
INSTALL = "pip install 'dslc[mlir]'"
ELEMENTS: dict[str, Element] = {"float32": "f32", "bfloat16": "bf16"}
FLAGS = ("--iree-llvmcpu-target-cpu=host",)


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Weight(Row):
    """A stacked weight: one axis for each array on the way to it, then the tensor's own.

    Of one with ``lanes``, so many of the tensor's rows lie side by side: [rows / lanes, columns,
    lanes]. One that is kept as codes has a second row, its name with ``SCALES`` behind.
    """

    tensor: str
    shape: tuple[int, ...]
    element: Literal["f32", "bf16", "f8E4M3FN", "f8E5M2", "i8"]
    lanes: Literal[16] | None = None  # LANES


class Kept(Row):
    """A cache or state: an argument and a result of every function."""

    path: str
    arrays: tuple[int, ...]
    own: tuple[int, ...]
    element: Literal["f32", "bf16"]


class Layout(Row):
    """The whole of ``module.json``."""

    name: str  # of the module
    dtype: Literal["float32", "bfloat16"]
    processor: tuple[str, ...]  # what the code was compiled for
    compiler: str = "?"  # IREE's version
    weights: dict[str, Weight]
    caches: tuple[Kept, ...]


def layout_of(files: dict[str, bytes], manifest: Manifest) -> Layout:
    """
    Raises:
        ManifestError: it is none, or does not fit the manifest, or the code was compiled for a
            processor that can do more.
    """
    if BYTES not in files:
        raise ManifestError(f"the compiled model holds no {BYTES}: compile it again")
    try:
        layout = Layout.model_validate_json(files[LAYOUT])
    except KeyError:
        raise ManifestError(f"the compiled model holds no {LAYOUT}: compile it again") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ManifestError(f"{LAYOUT}: {place}: {first['msg']}") from None
    if layout.caches != kept([row.pattern() for row in manifest.caches], layout.dtype):
        raise ManifestError(f"{LAYOUT} has other caches than the manifest: compile it again")
    lacking = sorted(set(layout.processor) - set(features()))
    if lacking:
        raise ManifestError(
            "the module was compiled for a processor with instructions that this one lacks "
            f"({', '.join(lacking[:6])}): compile it here"
        )
    return layout


def stored(
    parameters: Mapping[str, Pattern], packed: Collection[str], dtype: str
) -> dict[str, Weight]:
    """What is kept of a module's parameters, numbers or codes and scales, by its name.

    Args:
        packed: the names of those that are (``Weights``).
    """
    weights, found = Weights({}, ELEMENTS[dtype], frozenset(packed)), {}
    for key, pattern in parameters.items():
        lanes = LANES if key in weights.packed else None
        for value in weights.stacked(pattern):
            shape = tuple(int(axis.size) for axis in value.axes)
            row = dict(tensor=pattern.name, shape=shape, element=value.element, lanes=lanes)
            found[value.name] = Weight.model_validate(row)
    return found


def kept(caches: Iterable[CachePattern], dtype: str) -> tuple[Kept, ...]:
    """The caches of a module, in the order of its functions' arguments."""
    kinds: dict[str, Any] = {"act": ELEMENTS[dtype]}
    return tuple(
        Kept(
            path=row.path,
            arrays=tuple(map(len, row.ranges)),
            own=row.shape,
            element=kinds.get(row.dtype, "f32"),
        )
        for row in caches
        if ENTRY in row.entries
    )


def described(module: Module, dtype: str, compiler: str = "") -> Layout:
    """What ``module.json`` says of a module compiled on this processor.

    Args:
        compiler: the version of IREE's compiler.
    """
    return Layout(
        name=module.name,
        dtype=dtype,  # type: ignore[arg-type]
        processor=features(),
        compiler=compiler,
        weights=stored(module.parameters, module.packed, dtype),
        caches=kept(module.caches, dtype),
    )


def build(
    program: Program, elaborated: Program, dtype: str, progress: Callable[[str], None]
) -> dict[str, bytes]:
    """Compile a program.

    Args:
        elaborated: the same before any pass, which says what is cached.
        dtype: float32 or bfloat16.

    Returns:
        The bytes of each file, by its name.

    Raises:
        Unsupported: it has something without a lowering.
        UserError: IREE's compiler is not installed, or cannot compile the module.
    """
    from backends.mlir.module import lower
    from compiler.tensors import caches

    compile = _compiler()
    progress("module")
    module = lower(program, caches(elaborated), ELEMENTS[dtype])
    progress("IREE")
    compiled = compile(module.text)
    from iree.compiler.version import VERSION

    layout = described(module, dtype, VERSION or "")
    text = json.dumps(layout.model_dump(mode="json"), indent=1) + "\n"
    return {TEXT: module.text.encode(), BYTES: compiled, LAYOUT: text.encode()}


def _compiler() -> Callable[[str], bytes]:
    try:
        from iree import compiler
    except ImportError:
        raise UserError(f"--backend mlir needs IREE's compiler: {INSTALL}") from None

    def compile(text: str) -> bytes:
        try:
            found: bytes = compiler.compile_str(
                text, target_backends=["llvm-cpu"], extra_args=list(FLAGS)
            )
        except compiler.CompilerToolError as error:
            said = [line for line in str(error).splitlines() if "error:" in line]
            raise Unsupported(
                f"IREE cannot compile the module: {said[0].strip() if said else error}"
            ) from error
        return found

    return compile
