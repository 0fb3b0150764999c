"""Loading ``kernels.py`` with the binaries that were compiled ahead of time.

A binary is handed to Triton as its own cache would be: ``CompiledKernel`` of its metadata and its
machine code, which the driver loads. No kernel is compiled then. Where the GPU, or Triton, is not
the one that the binaries are for, Triton compiles the text of ``kernels.py`` at the first call.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from backends.pytorch.inputs import InputError
from backends.pytorch.modules import imported_as
from backends.pytorch.places import remember_text
from backends.triton.generate import CODE, INDEX
from backends.triton.installed import triton_version
from backends.triton.kernel import TRITON_DTYPES
from backends.triton.targets import multiplies_codes
from compiler.manifest import digest

ALIGNMENT = 16


def load_kernels(
    directory: Path,
    files: Mapping[str, bytes],
    device: torch.device,
    dtype: torch.dtype,
    notes: list[str],
) -> ModuleType:
    """The module of a compiled directory's kernels, its binaries in their places.

    Args:
        files: of the directory, as they were checked.
        notes: told why binaries are not used, in a sentence.

    Raises:
        InputError: kernels of this dtype, or for this device, they are not.
        UserError: there is no Triton, or one that is too old.
    """
    index = read_index(files)
    if str(dtype) != f"torch.{index['dtype']}":
        raise InputError(
            f"{directory} was compiled for activations in {index['dtype']}, not "
            f"{str(dtype).removeprefix('torch.')}: dslc compile --dtype says another"
        )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        raise InputError(
            f"{directory} was compiled for {index['target']}, and does not run on {device}: load "
            "it on a GPU (device cuda), or compile it with --target cpu"
        )
    found = triton_version()
    if interpreted:
        from backends.triton import interpreted as interpreter

        interpreter.install()
    else:
        _refuse_codes(directory, index, name_of(device))
    beside = {name: files[f"{name}.py"] for name in index.get("externs", [])}
    module = _module(directory, files[CODE], beside)
    if interpreted:
        return module
    reason = _other(index, device, found)
    if reason is None:
        attach(module, index, files)
    else:
        notes.append(f"{reason}; its kernels are compiled at their first call")
    return module


def read_index(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What ``kernels/index.json`` says: target, dtype, Triton's version, a row for each binary."""
    return dict(json.loads(files[INDEX]))


def _refuse_codes(directory: Path, index: Mapping[str, Any], gpu: str) -> None:
    """Kernels of 8-bit floats need a GPU that has them: elsewhere not even their text compiles."""
    types = {type for row in index["kernels"] for _, type, _ in row["arguments"]}
    if any(type.startswith("*fp8") for type in types) and not multiplies_codes(gpu):
        raise InputError(
            f"{directory} was compiled for {index['target']} with weights in 8-bit floats, which "
            f"this GPU, {gpu}, has not: compile without --deploy, or with one that keeps none so"
        )


def _other(index: Mapping[str, Any], device: torch.device, triton: str) -> str | None:
    """Why the binaries do not fit here."""
    if (gpu := name_of(device)) != index["target"]:
        return f"compiled for {index['target']}, and this GPU is {gpu}"
    if triton.split(".")[:2] != index["triton"].split(".")[:2]:
        return f"compiled by Triton {index['triton']}, and this is Triton {triton}"
    return None


def name_of(device: torch.device) -> str:
    """What this project calls a GPU: ``sm_90``, ``gfx942``."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _module(directory: Path, code: bytes, beside: Mapping[str, bytes]) -> ModuleType:
    """The module ``kernels``, with the modules that it imports from beside it."""
    with ExitStack() as names:
        for name, text in beside.items():
            names.enter_context(imported_as(name, _executed(directory / f"{name}.py", text)))
        return _executed(directory / CODE, code)


def _executed(path: Path, code: bytes) -> ModuleType:
    name = f"dslc_{path.stem}_{digest(code)[:16]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    remember_text(module, code.decode())
    exec(compile(code, module.__file__, "exec"), module.__dict__)
    return module


# -- binaries --------------------------------------------------------------------------------------


def attach(module: ModuleType, index: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Put the binaries in the place of the functions that would be compiled."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in index["kernels"]:
        rows.setdefault(row["kernel"], []).append(row)
    for name, variants in rows.items():
        function = getattr(module, name)
        kernels = {_key(row): _Variant(function, row, files) for row in variants}
        setattr(module, name, Precompiled(function, kernels))


Key = tuple[tuple[tuple[str, int], ...], int, int]


def _key(row: Mapping[str, Any]) -> Key:
    return tuple(sorted(row["constants"].items())), row["num_warps"], row["num_stages"]


@dataclass
class _Variant:
    """One binary: a kernel with its tiles."""

    function: Any  # Triton's, of the same text
    row: Mapping[str, Any]
    files: Mapping[str, bytes]
    _loaded: dict[int, Any] = field(default_factory=dict)

    def kernel(self) -> Any:
        """Triton's handle of the binary, on the GPU that is current."""
        from triton.runtime.driver import driver

        device = driver.active.get_current_device()
        if device not in self._loaded:
            self._loaded[device] = self._load()
        return self._loaded[device]

    def _load(self) -> Any:
        from triton.compiler import ASTSource, CompiledKernel

        signature = {name: type for name, type, _ in self.row["arguments"]}
        constants = self.row["constants"]
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(self.function, signature, dict(constants))
        with tempfile.TemporaryDirectory() as folder:  # the bytes that were checked, as files
            group = {}
            for path in (self.row["file"], self.row["metadata"]):
                kept = Path(folder) / Path(path).name
                kept.write_bytes(self.files[path])
                group[kept.name] = str(kept)
            return CompiledKernel(source, group, self.row["file"])

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Are these arguments what the binary was compiled for?"""
        return all(_fits(values[name], *rest) for name, *rest in self.row["arguments"])


def _fits(value: Any, type: str, aligned: bool) -> bool:
    if type.startswith("*"):
        name = TRITON_DTYPES.get(str(value.dtype).removeprefix("torch."))
        return name == type[1:] and not (aligned and value.data_ptr() % ALIGNMENT)
    if type == "i32":
        return -(1 << 31) <= value < 1 << 31 and not (aligned and value % ALIGNMENT)
    return True


class Precompiled:
    """A kernel that has binaries, launched as Triton's are: ``kernel[grid](*arguments, tiles)``.

    A call that none of them fits is compiled on the spot.
    """

    def __init__(self, function: Any, variants: Mapping[Key, _Variant]):
        self.function = function
        self.variants = variants
        self.compiled = 0  # calls that no binary fitted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        given = dict(options)
        warps, stages = given.pop("num_warps", 4), given.pop("num_stages", 1)
        names = self.function.arg_names
        values = {**dict(zip(names, args, strict=False)), **given}
        first = next(iter(self.variants.values()))
        constants = tuple(sorted((n, values[n]) for n in first.row["constants"] if n in values))
        variant = self.variants.get((constants, warps, stages))
        if variant is None or not variant.fits(values):
            self.compiled += 1
            self.function[grid](*args, **options)
            return
        ordered = [values[name] for name in names]
        variant.kernel()[(*grid, 1, 1)[:3]](*ordered)
