"""From a compiled directory to a model that runs: check, build, fill."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from backends.pytorch.ahead.decoder import Decoder, loaded, obstacle, read_plan
from backends.pytorch.ahead.rows import FewRows
from backends.pytorch.copies import Log, identity
from backends.pytorch.inputs import InputError
from backends.pytorch.memory import require
from backends.pytorch.model import Model
from backends.pytorch.modules import imported_as
from backends.pytorch.places import remember_text
from backends.pytorch.ranks import alike, connect
from backends.pytorch.sharded import ShardedModel, own_part, place_blocks
from backends.pytorch.weights import initialise
from backends.pytorch.weights.allocate import Memory
from backends.pytorch.weights.checkpoint import Match, match, open_checkpoint
from backends.pytorch.weights.fill import fill
from backends.pytorch.weights.problems import listing
from backends.pytorch.world import check_world
from compiler.manifest import Manifest, ManifestError, digest, read, verified_files

CODE = "model.py"
KERNELS = "kernels/index.json"  # of a directory compiled for a GPU
SOURCE_GRAPH = "source.txt"  # before passes rewrite it: has every value the source names
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Progress = Callable[[int, int], None]  # done, and in all


def load(
    directory: str | Path,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    edited: bool = False,
    placements: Mapping[str, Sequence[int]] | None = None,
    same: Mapping[str, Any] | None = None,
) -> Model:
    """Load a compiled model.

    The directory holds code, which is executed; a checkpoint holds none.

    Args:
        directory: what ``dslc compile`` wrote.
        checkpoint: a Hugging Face checkpoint folder; without one, weights are random.
        dtype: float32, bfloat16 or float16; as the checkpoint's config.json says unless given,
            float32 without one.
        seed: of random weights, each a function of the seed and its tensor's name.
        progress: called with what has been loaded and what there is in all.
        note: told, in a sentence each, what the user should know; warnings unless given.
        edited: execute the directory's code even if it was changed since it was compiled.
        placements: of a deployment with redundant blocks, by the path of their array: the number of
            the block in each place, as ``dslc balance`` finds it.
        same: what else must be the same on all ranks, by what it is called.

    A model that was compiled for a mesh is loaded by every rank at once, each with its part.

    Raises:
        ManifestError: the directory is not whole, was changed, or is another version's.
        CheckpointError: the checkpoint does not fit; every tensor at fault is named.
        MemoryNeeded: the weights do not fit on the device.
        InputError: there is no such device or dtype.
    """
    directory = Path(directory)
    manifest = read(directory)
    if manifest.backend != "pytorch":
        raise ManifestError(f"{directory} was compiled for the backend '{manifest.backend}'")
    if manifest.mesh:
        check_world(manifest)
    files = verified_files(directory, manifest, edited)
    place = _device(device)
    patterns = [row.pattern() for row in manifest.parameters]
    found, opened = None, None
    differences: list[str] = []
    if checkpoint is not None:
        opened = open_checkpoint(Path(checkpoint))
        differences = _differences(manifest, opened.config)
        found = match(opened, patterns, manifest.ignored, hint="; ".join(differences))
    plan = read_plan(files)
    stored = found.checkpoint.dtype if found else None
    compiled_for = plan.dtype if plan else _gpu_dtype(files)
    run_dtype = dtype_of(dtype or stored or compiled_for or torch.float32)
    notes = [*differences, *_notes(found)]
    if plan and (reason := obstacle(plan, place, run_dtype, found)):
        notes.append(f"the compiled decode step is not used: {reason}")
        plan = None
    unavailable = found.unavailable if found else {}
    needed = [p for p in patterns if not p.entries or set(p.entries) - unavailable.keys()]
    pieces = loaded(plan, files) if plan else {}

    kernels = None
    if manifest.target != "cpu":
        from backends.triton.load import load_kernels  # Triton

        kernels = load_kernels(directory, files, place, run_dtype, notes)
    emitted = _emitted(directory, files, kernels)
    mesh, copies, log = None, None, None
    if manifest.mesh:
        own = {"seed": seed, "dtype": str(run_dtype), "placement": placements and {**placements}}
        all_alike = alike(directory, manifest, opened, **own, **(same or {}))
        mesh, stamp = emitted.MESH, identity(opened) if opened else ""
        copies = connect(mesh, manifest, all_alike, place, stamp)
        patterns, needed, found = own_part(manifest, mesh, placements or {}, unavailable, found)
    module = emitted.build("meta", run_dtype)  # no memory yet
    memory = Memory(module, place, run_dtype, plan, pieces)
    bytes_read = 0
    require("loading the weights", sum(memory.needed(p) for p in needed), place)
    if found:
        log = Log(found.checkpoint) if copies else None
        bytes_read = fill(found, memory.of, progress, log)
    else:
        initialise.fill(patterns, memory.of, seed, progress)
    memory.complete(patterns, needed)

    for sentence in notes:
        if note:
            note(sentence)
        else:
            warnings.warn(sentence, stacklevel=3)  # of dslc.load
    source = files[SOURCE_GRAPH].decode() if SOURCE_GRAPH in files else None
    decoder = Decoder(plan, pieces, memory.weight, module) if plan else None
    products = None
    if plan and plan.few_rows:
        products = FewRows(pieces[plan.few_rows], pieces.get(plan.few_rows_of_blocks or ""))
    code = files[CODE].decode()
    if mesh is not None:
        shared = ShardedModel(module, manifest, memory.names, unavailable, notes, source, code)
        shared.replays.enabled = False  # its ranks talk within a step
        shared.mesh, shared.bytes_read = mesh, bytes_read
        if copies and log and opened:
            shared.bytes_compared = copies.compare(opened, log)
        place_blocks(shared, placements or {})
        shared.owns(patterns)
        return shared
    model = Model(module, manifest, memory.names, unavailable, notes, source, code)
    if kernels is not None:
        from backends.triton.sampler import sampler_of

        model.choose = sampler_of(kernels, json.loads(files[KERNELS])) or model.choose
    return model.ahead(decoder, products)


def _gpu_dtype(files: dict[str, bytes]) -> str | None:
    """What a GPU's kernels were compiled for, where there are some."""
    return str(json.loads(files[KERNELS])["dtype"]) if KERNELS in files else None


def _emitted(
    directory: Path, files: dict[str, bytes], kernels: ModuleType | None = None
) -> ModuleType:
    """The emitted module, from the very bytes that were checked.

    Args:
        kernels: what it imports under that name.
    """
    if CODE not in files:
        raise ManifestError(f"{directory} holds no {CODE}")
    name = f"dslc_compiled_{digest(files[CODE])[:16]}"
    module = ModuleType(name)
    module.__file__ = str(directory / CODE)
    sys.modules[name] = module  # classes are looked up by their module's name
    remember_text(module, files[CODE].decode())
    with imported_as("kernels", kernels):
        exec(compile(files[CODE], module.__file__, "exec"), module.__dict__)
    return module


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU")
    except RuntimeError as error:
        raise InputError(f"device '{device}': {str(error).splitlines()[0]}") from None
    return place


def dtype_of(asked: str | torch.dtype) -> torch.dtype:
    """A dtype that a model can run in, by its name.

    Raises:
        InputError: it is none.
    """
    named = str(asked).removeprefix("torch.")
    if named not in DTYPES:
        raise InputError(f"dtype '{named}': a model runs in {', '.join(DTYPES)}")
    return DTYPES[named]


def _differences(manifest: Manifest, config: dict[str, Any]) -> list[str]:
    """Where a checkpoint's config.json gives a constant another value than it was compiled with."""
    found = []
    for name, keys in manifest.config.items():
        compiled = manifest.constants.get(name)
        for key in keys:
            value: Any = config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is None:
                continue
            if compiled is not None and value != compiled:
                found.append(f"{key} is {value}, compiled for {compiled}")
            break
    if not found:
        return []
    return [f"config.json of the checkpoint is not what was compiled: {listing(found, 6)}"]


def _notes(found: Match | None) -> list[str]:
    if found is None:
        return []
    folder = found.checkpoint.folder
    notes = [
        f"'{entry}' is not available: {folder} lacks {listing(names, 2)}"
        for entry, names in found.unavailable.items()
    ]
    if found.extra:
        count = len(found.extra)
        what = "a tensor" if count == 1 else f"{count:,} tensors"
        notes.append(
            f"{folder} holds {what} that the model does not use: {listing(found.extra, 3)}"
        )
    return notes
