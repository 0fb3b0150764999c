"""Rows of a table by number: what an embedding is, and the choice of rows that are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends.triton.families.rows_example import random_rows
from backends.triton.kernel import (
    TRITON_DTYPES,
    Argument,
    Config,
    Kernel,
    Operator,
    Traffic,
    pointer,
)
from backends.triton.targets import Target

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK = 1024


@dataclass(frozen=True)
class Rows:
    """Rows ``[width]`` of ``dtype``; ``store`` writes into the table instead of reading from it."""

    width: int
    dtype: str = "bfloat16"
    store: bool = False


def generate(spec: Rows, target: Target) -> Operator:
    """``name(table, index) -> out``, or with ``store``: ``name(table, index, rows)``.

    ``table`` [n, width], ``index`` int64 [rows], 0 .. n; where one row is stored twice, one of the
    two stays.
    """
    name = f"{'store' if spec.store else 'take'}_rows_{spec.width}_{TRITON_DTYPES[spec.dtype]}"
    return Operator(
        name=name,
        kernels=(_kernel(spec, f"{name}_kernel"),),
        launcher=_launcher(spec, name),
        traffic=lambda sizes: _traffic(spec, sizes),
        shown={"tokens": 4096},
        dense=not spec.store,
        example=lambda sizes, device: _example(spec, sizes["tokens"], device),
    )


def _example(spec: Rows, count: int, device: str) -> tuple[Any, ...]:
    """Rows that lie far from one another in a table of several times as many."""
    import torch

    table = random_rows(4 * count, spec.width, spec.dtype, device)
    index = torch.randperm(4 * count, device=device)[:count]
    given = (random_rows(count, spec.width, spec.dtype, device),) if spec.store else ()
    return (table, index, *given)


def _kernel(spec: Rows, name: str) -> Kernel:
    there, here = f"number * {spec.width} + lane", f"row * {spec.width} + lane"
    copy = f"tl.store(rows + {here}, tl.load(table + {there}, inside), inside)"
    about = "rows[i] = table[index[i]]"
    if spec.store:
        copy = f"tl.store(table + {there}, tl.load(rows + {here}, inside), inside)"
        about = "table[index[i]] = rows[i]"
    moved = 2 * spec.width * BYTES[spec.dtype] + 8
    source = f'''
@triton.jit
def {name}(table, index, rows, BLOCK: tl.constexpr):
    """{about}; rows of {spec.width}.

    A program copies BLOCK numbers of a row. A row moves {moved:,} bytes and
    takes no FLOPs: the bound is memory.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < {spec.width}
    number = tl.load(index + row)
    {copy}
'''
    block = min(BLOCK, 1 << max(0, spec.width - 1).bit_length())
    return Kernel(
        name=name,
        source=source,
        arguments=(
            pointer("table", spec.dtype),
            Argument("index", "*i64"),
            pointer("rows", spec.dtype),
        ),
        configs=(Config({"BLOCK": block}, num_warps=max(1, block // 256)),),
    )


def _launcher(spec: Rows, name: str) -> str:
    launch = f"""config = pick({name}_kernel_configs, count)
        grid = (count, triton.cdiv({spec.width}, config["BLOCK"]), 1)
        {name}_kernel[grid](table, index, rows, **config)"""
    if spec.store:
        return f'''
def {name}(table, index, rows):
    """table[index] = rows; table [n, {spec.width}], index int64 [rows]."""
    count, rows = index.shape[0], rows.contiguous()
    if count:
        {launch}
'''
    return f'''
def {name}(table, index):
    """table[index] [rows, {spec.width}]; all of the table where there is no index."""
    if index is None:
        return table
    count = index.shape[0]
    rows = torch.empty((count, {spec.width}), dtype=table.dtype, device=table.device)
    if count:
        {launch}
    return rows
'''


def _traffic(spec: Rows, sizes: Mapping[str, int]) -> Traffic:
    moved = sizes["tokens"] * (2 * spec.width * BYTES[spec.dtype] + 8)
    return Traffic(bytes=moved, least=moved, flops=0)
