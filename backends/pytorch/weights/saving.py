"""A model's weights through ``torch.distributed.checkpoint``: nothing is gathered on one rank.

``Part`` is what a rank's ``state_dict`` holds: it tells which stretches of a checkpoint's tensor it
is, so that ``torch.distributed.checkpoint.save`` and ``load`` write and read each rank's own and
fit what one mesh has written to another, or to one process. ``save`` uses the same planning and
writes a Hugging Face checkpoint: every rank writes its stretches to where they lie in the files.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from backends.pytorch.weights.checkpoint import INDEX
from backends.pytorch.weights.dtypes import DTYPES
from compiler.errors import UserError
from compiler.shards import OwnTensor

if TYPE_CHECKING:
    from backends.pytorch.model import Model

FILE_BYTES = 5_000_000_000  # of weights in a file, as Hugging Face has it
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")  # what a checkpoint has beside its weights
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SaveError(UserError):
    """Weights could not be written."""


class Part(torch.Tensor):
    """A stored tensor of which this rank has a part. It has the whole tensor's shape, as a DTensor
    has, but may lie in several stretches; nothing is computed with it.

    Attributes:
        local: the part, in the parameter's memory.
        boxes: where in the whole the part lies, and where in ``local``: rectangles, of slices for
            each dim.
    """

    local: torch.Tensor
    boxes: list[tuple[tuple[slice, ...], tuple[slice, ...]]]

    @staticmethod
    def __new__(cls, local: torch.Tensor, own: OwnTensor) -> Part:
        made: Part = torch.Tensor._make_wrapper_subclass(
            cls, own.stored_shape, dtype=local.dtype, device=local.device
        )
        made.local, made.boxes = local.detach(), list(_boxes(own))
        return made

    def to_local(self) -> torch.Tensor:
        return self.local

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Part({list(self.local.shape)} of {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func}: this rank has a part of the tensor, to_local()")

    # What torch.distributed.checkpoint asks of a tensor that is not whole.

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(
                torch.Size(s.start for s in there), torch.Size(s.stop - s.start for s in there)
            )
            for there, _ in self.boxes
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for there, here in self.boxes:
            if index.offset == torch.Size(s.start for s in there):
                return self.local[here]
        raise ValueError(f"'{index.fqn}' has no part that begins at {index.offset}")


def _boxes(own: OwnTensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    dims = []
    for runs in own.runs:
        at, pieces = 0, []
        for begin, end in runs:
            pieces.append((slice(begin, end), slice(at, at + end - begin)))
            at += end - begin
        dims.append(pieces)
    for chosen in product(*dims):
        yield tuple(there for there, _ in chosen), tuple(here for _, here in chosen)


# -- a Hugging Face checkpoint ---------------------------------------------------------------------


def save(model: Model, folder: str | Path, checkpoint: str | Path | None = None) -> None:
    """Write a model's weights as a Hugging Face checkpoint, which any mesh, one process, or another
    program can load. All ranks call it, with a folder that all of them reach.

    Args:
        folder: is made; it must not be there.
        checkpoint: whose config.json and tokenizer are put beside the weights.

    Raises:
        SaveError: it is there already, or something cannot be written; no folder is left then.
    """
    beside: list[Path] = []
    if checkpoint is not None:
        found = (p for pattern in BESIDE for p in Path(checkpoint).glob(pattern))
        beside = sorted(p for p in found if p.name != INDEX)
    weights = {
        name: tensor if isinstance(tensor, Part) else tensor.detach()
        for name, tensor in model.state_dict().items()
    }
    writer = _Writer(Path(folder), beside)
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            if alone:  # torch tells so, as if it might not be meant
                warnings.simplefilter("ignore", UserWarning)
            save_distributed(weights, storage_writer=writer, no_dist=alone)
    except CheckpointException as error:
        writer.undo()
        number, (why, _) = min(error.failures.items())
        told = f": {why.strerror}" if isinstance(why, OSError) and why.strerror else f": {why}"
        told = str(why) if isinstance(why, SaveError) else f"{folder} cannot be written{told}"
        raise SaveError(told if number == 0 else f"{told} (rank {number})") from None
    except BaseException:
        writer.undo()
        raise


class _Writer(StorageWriter):
    """Writes safetensors files whose place for every tensor is known before any rank writes.

    The coordinator lays the files out in a folder beside the final one and reserves their room;
    every rank writes its parts; the coordinator gives the folder its name.
    """

    def __init__(self, folder: Path, beside: Sequence[Path]):
        self.folder, self.beside = folder, beside
        self.made: Path | None = None
        self.weight_map: dict[str, str] = {}
        self.total = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Lay out the files; every plan is told where each of its tensors begins."""
        if self.folder.exists():
            raise SaveError(f"{self.folder} is there already")
        tensors: dict[str, TensorWriteData] = {}
        for plan in plans:
            for item in plan.items:
                if item.tensor_data is not None:
                    tensors.setdefault(item.index.fqn, item.tensor_data)
        made = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
        made.mkdir(parents=True)
        self.made = made
        places: dict[str, tuple[str, int]] = {}
        for name, held in self._files(tensors).items():
            header = _header(held)
            at = len(header)
            for tensor, data in held.items():
                places[tensor] = str(made / name), at
                at += _size(data)
                self.weight_map[tensor] = name
            self.total += at - len(header)
            with open(made / name, "wb") as file:
                file.write(header)
                file.flush()
                _reserve(file.fileno(), at)
        return [
            replace(p, storage_data={i.index.fqn: places[i.index.fqn] for i in p.items})
            for p in plans
        ]

    def _files(self, tensors: dict[str, TensorWriteData]) -> dict[str, dict[str, TensorWriteData]]:
        groups: list[dict[str, TensorWriteData]] = [{}]
        size = 0
        for name in sorted(tensors):
            if groups[-1] and size + _size(tensors[name]) > FILE_BYTES:
                groups.append({})
                size = 0
            groups[-1][name] = tensors[name]
            size += _size(tensors[name])
        if len(groups) == 1:
            return {"model.safetensors": groups[0]}
        count = len(groups)
        return {f"model-{n:05}-of-{count:05}.safetensors": g for n, g in enumerate(groups, 1)}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = []
        handles: dict[str, int] = {}
        try:
            for item in plan.items:
                assert item.tensor_data is not None
                path, start = plan.storage_data[item.index.fqn]
                if path not in handles:
                    handles[path] = os.open(path, os.O_WRONLY)
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                _write(handles[path], start, tensor.detach().cpu(), item.tensor_data)
                written.append(WriteResult(item.index, tensor.nbytes, None))
            for handle in handles.values():
                os.fsync(handle)
        finally:
            for handle in handles.values():
                os.close(handle)
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.made is not None
        for path in self.beside:
            shutil.copyfile(path, self.made / path.name)
        if set(self.weight_map.values()) != {"model.safetensors"}:
            about = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
            (self.made / INDEX).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        self.made.rename(self.folder)
        self.made = None

    def undo(self) -> None:
        if self.made is not None:
            shutil.rmtree(self.made, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _size(data: TensorWriteData) -> int:
    return data.size.numel() * data.properties.dtype.itemsize


def _header(tensors: dict[str, TensorWriteData]) -> bytes:
    """What a safetensors file begins with: the length of a JSON object, and the object."""
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, data in tensors.items():
        end = at + _size(data)
        dtype = NAMES[data.properties.dtype]
        found[name] = {"dtype": dtype, "shape": list(data.size), "data_offsets": [at, end]}
        at = end
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _reserve(handle: int, size: int) -> None:
    """Room for a file, so that a disk that is too small is found out before any rank writes."""
    try:
        os.posix_fallocate(handle, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.truncate(handle, size)  # a file system that reserves nothing


def _write(handle: int, start: int, part: torch.Tensor, data: TensorWriteData) -> None:
    """A rectangle of a tensor to where it lies in a file: rows that are whole at once."""
    shape, width = tuple(data.size), data.properties.dtype.itemsize
    box = list(zip(data.chunk.offsets, data.chunk.sizes, strict=True))
    divided = [i for i, size in enumerate(shape) if box[i][1] != size]
    last = divided[-1] if divided else 0
    below = torch.Size(shape[last + 1 :]).numel() * width
    first, count = box[last] if box else (0, 1)
    rows = memoryview(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    length = count * below
    for number, at in enumerate(product(*(range(o, o + s) for o, s in box[:last]))):
        place = 0
        for size, index in zip(shape[: last + 1], (*at, first), strict=False):
            place = place * size + index
        stretch, done = rows[number * length : (number + 1) * length], 0
        while done < length:
            done += os.pwrite(handle, stretch[done:], start + place * below + done)
