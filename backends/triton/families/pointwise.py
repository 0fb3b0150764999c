"""Elementwise work on rows: one pass over memory, whatever the expression.

The expression comes from the graph (``patterns/pointwise.py``), as statements of Triton over the
tile's index variables; views, stacks and rotations in it are only other indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backends.triton.families.rows_example import random_like
from backends.triton.kernel import Config, Kernel, Operator, Traffic, pointer, size
from backends.triton.targets import Target

TILE = 1024  # elements of a program: 8 for each of 128 threads

# The libraries' sine keeps a path for huge arguments, which takes a stack. Polynomials of degree 7
# and 8 on an eighth of a turn either side: Cephes, sinf.c and cosf.c.
SINE = """
@triton.jit
def sine(x, quarters: tl.constexpr):
    \"\"\"sin(x + quarters * pi / 2) within 2e-7, for |x| < 2^31.\"\"\"
    turns = tl.floor(x.to(tl.float64) * 0.6366197723675814 + 0.5)
    rest = (x.to(tl.float64) - turns * 1.5707963267948966).to(tl.float32)
    quarter = turns.to(tl.int64) + quarters
    square = rest * rest
    odd = -1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4)
    even = 4.166664568298827e-2 + square * (
        -1.388731625493765e-3 + square * 2.443315711809948e-5
    )
    odd = rest + rest * square * odd
    even = 1 - 0.5 * square + square * square * even
    value = tl.where((quarter & 1) != 0, even, odd)
    return tl.where((quarter & 2) != 0, -value, value)
"""


@dataclass(frozen=True)
class Leaf:
    """A tensor that is read.

    Attributes:
        dtype: by torch's name.
        per_row, once: numbers that are read for each row, and once for all.
        stored: numbers of a row of it, or, if it is not ``moving``, of all of it.
    """

    name: str
    dtype: str
    width: int  # bytes of a number
    per_row: int = 0
    once: int = 0
    stored: int = 1
    moving: bool = True


@dataclass(frozen=True)
class Pointwise:
    """An expression over ``[rows, *dims]``.

    Attributes:
        dims: name and size of each dim of a row, in the order in which they are stored.
        leaves: what is read.
        statements: Triton: from ``row`` and a variable for each dim to ``result``.
        dtype, width: of the result.
        shape: of the result, as Python; ``rows`` is the number of rows, if it has any.
        rows: an expression for the number of rows, from the leaves; "1" if there is no such dim.
        about: the equation.
        flops: arithmetic operations for each number of the result.
        whole: a program has all of a row, as it sums along it.
        lead: how many rows there are for each of the result's first dim.
    """

    name: str
    dims: tuple[tuple[str, int], ...]
    leaves: tuple[Leaf, ...]
    statements: tuple[str, ...]
    dtype: str
    width: int
    rows: str
    shape: str
    about: str
    flops: int
    whole: bool = False
    lead: int = 1

    @property
    def inner(self) -> int:
        """Numbers of a row."""
        product = 1
        for _, length in self.dims:
            product *= length
        return product


def generate(spec: Pointwise, target: Target) -> Operator:
    """The operator ``name(*leaves) -> result``; leaves in any layout, the result contiguous."""
    columns = min(TILE, 1 << max(0, spec.inner - 1).bit_length())
    if spec.whole:
        columns = 1 << max(0, spec.inner - 1).bit_length()
    warps = min(16, max(4, columns // 512))
    config = Config({"ROWS": max(1, TILE // columns), "COLUMNS": columns}, num_warps=warps)
    kernel = Kernel(
        name=f"{spec.name}_kernel",
        source=_source(spec),
        arguments=(
            *(pointer(leaf.name, leaf.dtype) for leaf in spec.leaves),
            pointer("out", spec.dtype),
            size("rows"),
        ),
        configs=(config,),
        helpers=(("sine", SINE),) if any("sine(" in text for text in spec.statements) else (),
    )
    return Operator(
        name=spec.name,
        kernels=(kernel,),
        launcher=_launcher(spec),
        traffic=lambda sizes: _traffic(spec, sizes),
        shown={"tokens": 4096},
        example=lambda sizes, device: tuple(
            random_like(
                (*([sizes["tokens"]] if leaf.moving else []), leaf.stored), leaf.dtype, device
            )
            for leaf in spec.leaves
        ),
    )


def _source(spec: Pointwise) -> str:
    leaves = ", ".join(leaf.name for leaf in spec.leaves)
    indices = []
    below = 1
    for at in range(len(spec.dims) - 1, -1, -1):
        name, length = spec.dims[at]
        quotient = f"column // {below}" if below > 1 else "column"
        indices.append(f"{name} = {quotient}" + (f" % {length}" if at else ""))
        below *= length
    read = sum(leaf.per_row * leaf.width for leaf in spec.leaves)
    written = spec.inner * spec.width
    lines = "\n    ".join([*reversed(indices), *spec.statements])
    return f'''
@triton.jit
def {spec.name}_kernel({leaves}, out, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """{spec.about}

    A program computes ROWS x COLUMNS numbers of [rows, {spec.inner}]. A row reads {read:,} bytes
    and writes {written:,}, and takes {spec.flops * spec.inner:,} FLOPs: the bound is memory.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < {spec.inner})
    {lines}
    tl.store(out + row * {spec.inner} + column, result.to(out.dtype.element_ty), inside)
'''


def _launcher(spec: Pointwise) -> str:
    leaves = ", ".join(leaf.name for leaf in spec.leaves)
    device = spec.leaves[0].name
    return f'''
def {spec.name}({leaves}):
    """{spec.about}"""
    rows = {spec.rows}
    out = torch.empty({spec.shape}, dtype=torch.{spec.dtype}, device={device}.device)
    if rows:
        config = pick({spec.name}_kernel_configs, rows)
        grid = (triton.cdiv(rows, config["ROWS"]), triton.cdiv({spec.inner}, config["COLUMNS"]), 1)
        {spec.name}_kernel[grid]({leaves}, out, rows, **config)
    return out
'''


def _traffic(spec: Pointwise, sizes: Mapping[str, int]) -> Traffic:
    rows = sizes["tokens"] if spec.rows != "1" else 1
    moved = rows * spec.lead * spec.inner * spec.width
    for leaf in spec.leaves:
        moved += (rows * leaf.per_row + leaf.once) * leaf.width
    return Traffic(bytes=moved, least=moved, flops=rows * spec.lead * spec.inner * spec.flops)
