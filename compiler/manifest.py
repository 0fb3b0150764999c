"""``manifest.json``: what a compiled directory holds, as data that other tools can read.

``parameters`` has one row per parameter of the source, arrays kept as patterns: the row of
``model.layers.{0}.mlp.experts.{1}.up_proj.weight`` has ``ranges`` [[3, 61], [0, 256]], half-open; a
number computed from these stands as ``{2 * $0 + 1}``.
``caches`` has one row per value the author marked ``cached``. The text is validated when it is
read; a directory whose files are not those that were written is refused before any of them is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from compiler import shards, tensors
from compiler.errors import UserError
from compiler.ir import DType, Program
from compiler.manifest_coding import StoredRow
from dsl.templates import numbered

# Raised when a directory written by this version cannot be read by an older one, or the reverse.
ABI = 1
FILE_NAME = "manifest.json"

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256 of the bytes
Range = tuple[int, int]  # half-open


class ManifestError(UserError):
    """A compiled directory that cannot be loaded, in one sentence."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceFile(_Row):
    """A file of the source, imports included, as it was when it was compiled."""

    name: str
    sha256: Hash


class InputRow(_Row):
    """An argument of an entry: int64 token numbers ``0 .. below`` if ``below`` is given.

    With ``shift_of`` it is another input moved along time, and callers do not pass it.
    """

    name: str
    dtype: str
    dims: tuple[str, ...]
    below: NonNegativeInt | None = None
    shift_of: str | None = None
    shift: int = 0


class EntryRow(_Row):
    """A method of the emitted model: ``model.<method>(step, *inputs)``."""

    inputs: tuple[InputRow, ...]
    dims: tuple[str, ...]  # of the result
    shape: tuple[int | str, ...]  # sizes that are known only at run time are words


class DimRow(_Row):
    """How a stored dim is divided: an index in equal contiguous parts over mesh axes, the first
    outermost; a ``sum`` or ``product`` (row-major) in its parts."""

    size: NonNegativeInt
    axes: tuple[str, ...] = ()
    form: Literal["atom", "sum", "product"] = "atom"
    parts: tuple[DimRow, ...] = ()


class ArrayRow(_Row):
    """How an array of modules is dealt out in contiguous runs over mesh axes, with so many copies:
    on the node of their block where tokens are sent once to each of ``nodes``."""

    axes: tuple[str, ...]
    redundant: NonNegativeInt = 0
    nodes: NonNegativeInt = 1


class ParameterRow(_Row):
    """Stored tensors: ``compiler.tensors.Pattern`` as data."""

    path: str
    tensor: str
    ranges: tuple[Range, ...]
    dims: tuple[str, ...]
    shape: tuple[NonNegativeInt, ...]
    layout: Literal["row-major"] = "row-major"
    format: DType  # act: the dtype the model is run in
    stored: StoredRow | None = None  # None: as ``format`` says; else it is kept as codes
    shard: tuple[DimRow, ...] | None = None  # of each dim; None: whole on every rank
    dealt: tuple[ArrayRow | None, ...] | None = None  # of each range; None: all on every rank
    role: Literal["param", "state"]
    initial: Literal["matrix", "gain", "shift", "state"]
    entries: tuple[str, ...]

    @model_validator(mode="after")
    def _tensor_is_a_name(self) -> ParameterRow:
        if all(_ranges(self.ranges)):
            numbered(self.tensor, _ranges(self.ranges))
        return self

    @staticmethod
    def of(pattern: tensors.Pattern, shard: shards.Shard | None = None) -> ParameterRow:
        return ParameterRow(
            shard=_dims(shard.dims) if shard and shard.dims else None,
            dealt=_arrays(shard.arrays) if shard and shard.arrays else None,
            path=pattern.path,
            tensor=pattern.name,
            ranges=_pairs(pattern.ranges),
            dims=pattern.dims,
            shape=pattern.shape,
            format=pattern.dtype,
            stored=StoredRow.of(pattern.coding) if pattern.coding else None,
            role=pattern.role,
            initial=pattern.initial,
            entries=pattern.entries,
        )

    def pattern(self) -> tensors.Pattern:
        return tensors.Pattern(
            path=self.path,
            name=self.tensor,
            ranges=_ranges(self.ranges),
            shape=self.shape,
            dims=self.dims,
            dtype=self.format,
            role=self.role,
            initial=self.initial,
            entries=self.entries,
            coding=self.stored.coding() if self.stored else None,
        )


class CacheRow(_Row):
    """A cached value: per sequence and position ``shape``, row-major in the order of ``dims``.

    With ``last``, a sequence keeps so many of these, however long it is: those of its last
    positions, or the state of a ``scan``.
    """

    path: str
    ranges: tuple[Range, ...]
    dims: tuple[str, ...]
    shape: tuple[NonNegativeInt, ...]
    format: DType
    entries: tuple[str, ...]
    last: NonNegativeInt | None = None

    @staticmethod
    def of(pattern: tensors.CachePattern) -> CacheRow:
        return CacheRow(
            path=pattern.path,
            ranges=_pairs(pattern.ranges),
            dims=pattern.dims,
            shape=pattern.shape,
            format=pattern.dtype,
            entries=pattern.entries,
            last=pattern.last,
        )

    def pattern(self) -> tensors.CachePattern:
        return tensors.CachePattern(
            path=self.path,
            ranges=_ranges(self.ranges),
            dims=self.dims,
            shape=self.shape,
            dtype=self.format,
            entries=self.entries,
            last=self.last,
        )


class ContextRow(_Row):
    """How many positions a sequence may have, by which requirement of the source."""

    positions: PositiveInt
    place: str  # std/rotary.arch:27
    text: str


class Manifest(_Row):
    """The whole of ``manifest.json``."""

    abi: int = ABI
    dslc: str  # the version that wrote it
    model: str
    sources: tuple[SourceFile, ...]
    constants: dict[str, int | float | bool | str | None]
    config: dict[str, tuple[str, ...]] = {}  # config.json's keys of constants, first ones first
    context: ContextRow | None = None  # None: sequences of any length
    pairs: NonNegativeInt = 0  # numbers held at once per token and position of its history
    deployment: str | None = None
    mesh: dict[str, PositiveInt] = {}  # ranks along each axis, row-major
    batch: tuple[str, ...] = ()  # axes that sequences are spread over
    backend: str = "pytorch"
    target: str = "cpu"
    passes: tuple[str, ...] = ()
    entries: dict[str, EntryRow]
    parameters: tuple[ParameterRow, ...]
    ignored: tuple[str, ...] = ()  # tensors a checkpoint may hold that the model does not need
    caches: tuple[CacheRow, ...]
    files: dict[str, Hash]

    @field_validator("files")
    @classmethod
    def _files_stay_inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
                raise ValueError(f"the file name '{name}' leaves the directory")
        return files

    def text(self) -> str:
        """The file's text: one row per line, so that two versions can be compared by eye."""
        fields = self.model_dump(mode="json")
        lines = []
        for key, value in fields.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
                lines.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
            else:
                lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"


def build(
    program: Program,
    *,
    version: str,
    sources: Mapping[str, str],
    passes: Iterable[str],
    files: Mapping[str, bytes],
    config: Mapping[str, tuple[str, ...]] | None = None,
    context: ContextRow | None = None,
    pairs: int = 0,
    deployment: str | None = None,
    local: Program | None = None,
    backend: str = "pytorch",
    target: str = "cpu",
) -> Manifest:
    """The manifest of a program that was compiled into ``files``.

    Args:
        program: as elaborated: what an entry reads must not have been rewritten.
        sources: the text of each source file, by the name it is shown under.
        config: the keys of ``config.json`` that constants were, or could have been, taken from.
        context: how many positions a sequence may have; any number unless given.
        pairs: numbers that are held at once for each token and position of its history.
        local: what a rank runs, where the deployment has a mesh.
        files: the bytes of each file of the directory, by its name there.
    """
    rows = [ParameterRow.of(p) for p in tensors.patterns(program)]
    mesh = {a: local.sizes[f"ranks.{a}"] for a in local.mesh} if local else {}
    if local and mesh:
        rows = [ParameterRow.of(p, s) for p, s in shards.shards(program, local)]
    return Manifest(
        dslc=version,
        model=program.name,
        sources=tuple(SourceFile(name=n, sha256=digest(t.encode())) for n, t in sources.items()),
        constants=dict(program.constants),
        config=dict(config or {}),
        context=context,
        pairs=pairs,
        deployment=deployment,
        mesh=mesh,
        batch=local.batch if local else (),
        backend=backend,
        target=target,
        passes=tuple(passes),
        entries={name: _entry(program, name) for name in program.entries},
        parameters=tuple(rows),
        ignored=tensors.ignored(program),
        caches=tuple(CacheRow.of(c) for c in tensors.caches(program)),
        files={name: digest(data) for name, data in files.items()},
    )


def read(directory: Path) -> Manifest:
    """The manifest of a compiled directory.

    Raises:
        ManifestError: there is none, it was written by a version whose directories this one cannot
            read, or a field of it is wrong.
    """
    path = directory / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problem = (
            "there is no such directory" if not directory.is_dir() else f"no {FILE_NAME} in it"
        )
        raise ManifestError(f"{directory} is not a compiled model: {problem}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ManifestError(f"{path}: expected an object, found {type(fields).__name__}")
    abi = fields.get("abi")
    if abi != ABI:  # before the fields, which another ABI may have changed
        by = f" by dslc {fields['dslc']}" if isinstance(fields.get("dslc"), str) else ""
        raise ManifestError(
            f"{directory} was compiled{by} with ABI {abi}; "
            f"this dslc reads ABI {ABI}: compile it again"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ManifestError(f"{path}: {place}: {first['msg']}{more}") from None


def verified_files(directory: Path, manifest: Manifest, edited: bool = False) -> dict[str, bytes]:
    """The bytes of every file of the directory, each read once and found to be what was written.

    Run what this returns, not what is in the file by then.

    Args:
        edited: take the files as they are, changed since they were written or not.

    Raises:
        ManifestError: a file is missing, cannot be read, or has been changed.
    """
    found = {}
    for name, expected in manifest.files.items():
        try:
            found[name] = (directory / name).read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ManifestError(f"{directory / name} cannot be read: {reason}") from None
        if digest(found[name]) != expected and not edited:
            raise ManifestError(
                f"{directory / name} is not the file that was compiled (SHA-256 "
                f"{digest(found[name])[:12]}..., expected {expected[:12]}...): compile it again"
            )
    return found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entry(program: Program, name: str) -> EntryRow:
    entry = program.entries[name]
    body = program.bodies[entry.body]
    rows = []
    for given, node in zip(entry.inputs, body.inputs, strict=True):
        rows.append(
            InputRow(
                name=given.name,
                dtype=node.type.dtype,
                dims=node.type.names,
                below=program.size(node.type.of) if node.type.of else None,
                shift_of=given.shift_of,
                shift=given.shift,
            )
        )
    result = body.result.type
    sizes = program.sizes
    shape = tuple(
        d.size.at(sizes) if d.size.names <= sizes.keys() else str(d.size) for d in result.dims
    )
    return EntryRow(inputs=tuple(rows), dims=result.names, shape=shape)


def _dims(dims: Iterable[shards.DimShard]) -> tuple[DimRow, ...]:
    return tuple(DimRow(size=d.size, axes=d.axes, form=d.form, parts=_dims(d.parts)) for d in dims)


def _arrays(arrays: Iterable[shards.ArrayShard | None]) -> tuple[ArrayRow | None, ...]:
    return tuple(
        None if a is None else ArrayRow(axes=a.axes, redundant=a.redundant, nodes=a.nodes)
        for a in arrays
    )


def _pairs(ranges: Iterable[range]) -> tuple[Range, ...]:
    return tuple((r.start, r.stop) for r in ranges)


def _ranges(pairs: Iterable[Range]) -> tuple[range, ...]:
    return tuple(range(start, stop) for start, stop in pairs)
