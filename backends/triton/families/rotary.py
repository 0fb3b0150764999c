"""Rotary position embedding: pairs of a head's numbers turned by angles of their position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from backends.triton.families.attention import TRITON_NAMES, indented
from backends.triton.kernel import Config, Kernel, Operator, Traffic, pointer, size
from backends.triton.targets import Target

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class RotarySpec:
    """Heads ``[tokens, heads, dim]`` turned by tables ``[tokens, dim / 2]``.

    Attributes:
        halves: pair p is (p, p + dim / 2); else (2p, 2p + 1).
        token_stride, head_stride: of the input, in numbers; those of a contiguous one unless given.
        offset: the input is whole rows of ``token_stride`` numbers, and the first head is so far
            in them; None: it is the heads themselves, a view perhaps.
        dtype: of input and result; cosines, sines and the arithmetic are float32.
    """

    heads: int
    dim: int
    halves: bool = False
    token_stride: int = 0
    head_stride: int = 0
    dtype: str = "bfloat16"
    offset: int | None = None

    def __post_init__(self) -> None:
        if self.dim % 2:
            raise ValueError(f"{self.dim} numbers do not make pairs")

    @property
    def pairs(self) -> int:
        return self.dim // 2

    @property
    def name(self) -> str:
        strided = [f"from{self.token}_{self.head}"] if self.token_stride or self.head_stride else []
        strided += [f"at{self.offset}"] if self.offset is not None else []
        kind = "halves" if self.halves else "pairs"
        dtype = [] if self.dtype == "bfloat16" else [self.dtype]
        return "_".join([f"rotary_{kind}_{self.heads}x{self.dim}", *strided, *dtype])

    @property
    def head(self) -> int:
        return self.head_stride or self.dim

    @property
    def token(self) -> int:
        return self.token_stride or self.heads * self.head


def generate(spec: RotarySpec, target: Target) -> Operator:
    """The operator ``name(x, cosine, sine) -> y``, y contiguous ``[tokens, heads, dim]``."""
    arguments = (
        pointer("x", spec.dtype),
        pointer("cosine", "float32"),
        pointer("sine", "float32"),
        pointer("y", spec.dtype),
        size("rows"),
    )
    ordered = tuple(candidates(spec, target))
    name = f"{spec.name}_kernel"
    kernel = Kernel(name, _source(spec, name), arguments, ordered[:1], ordered[1:])
    given = f"x [tokens, {spec.heads}, {spec.dim}]"
    if spec.offset is not None:
        given = f"the heads in rows x [tokens, {spec.token}]"
    launcher = f'''\
def {spec.name}(x, cosine, sine):
    """y [tokens, {spec.heads}, {spec.dim}]: {given}, turned.

    cosine, sine: f32 [tokens, {spec.pairs}].
    """
    y = torch.empty(x.shape[0], {spec.heads}, {spec.dim}, dtype=x.dtype, device=x.device)
    rows = x.shape[0] * {spec.heads}
    if rows:
        config = pick({name}_configs, rows)
        {name}[(triton.cdiv(rows, config["BLOCK_R"]), 1, 1)](x, cosine, sine, y, rows, **config)
    return y
'''
    return Operator(
        name=spec.name,
        kernels=(kernel,),
        launcher=launcher,
        traffic=lambda sizes: traffic(spec, sizes),
        shown={"tokens": 4096},
        dense=spec.offset is not None or not (spec.token_stride or spec.head_stride),
        example=lambda sizes, device: _example(spec, sizes["tokens"], device),
    )


def traffic(spec: RotarySpec, sizes: Mapping[str, int]) -> Traffic:
    """What a call moves: the tables are read from memory once, all heads of a token through L1."""
    tokens = sizes["tokens"]
    moved = tokens * (2 * spec.heads * spec.dim * BYTES[spec.dtype] + 2 * spec.pairs * 4)
    return Traffic(moved, moved, 3 * tokens * spec.heads * spec.dim)


def _example(spec: RotarySpec, tokens: int, device: str) -> tuple[Any, ...]:
    import torch

    last = (spec.heads - 1) * spec.head + spec.dim
    angle = torch.randn(tokens, spec.pairs, device=device)
    if spec.offset is not None:
        rows = torch.randn(tokens, spec.token, dtype=getattr(torch, spec.dtype), device=device)
        return rows, angle.cos(), angle.sin()
    numbers = torch.randn(
        tokens * spec.token + last, dtype=getattr(torch, spec.dtype), device=device
    )
    x = numbers.as_strided((tokens, spec.heads, spec.dim), (spec.token, spec.head, 1))
    return x, angle.cos(), angle.sin()


def candidates(spec: RotarySpec, target: Target) -> Iterator[Config]:
    """Rows of a program: so many that a thread has about 16 numbers on their way."""
    width = 2 << (spec.pairs - 1).bit_length()
    found = [Config({"BLOCK_R": rows}, warps) for rows in (4, 8, 16, 32, 64) for warps in (2, 4, 8)]

    def far(config: Config) -> tuple[float, int]:
        each = config.constants["BLOCK_R"] * width / (config.num_warps * target.warp)
        return abs(each - 16), abs(config.num_warps - 4)

    yield from sorted(found, key=far)


def _source(spec: RotarySpec, name: str) -> str:
    pairs, width = spec.pairs, 1 << (spec.pairs - 1).bit_length()
    cast = f"to(tl.{TRITON_NAMES[spec.dtype]})"
    lines = [
        "r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)",
        "asked = r < rows",
        f"token = (r // {spec.heads}).to(tl.int64)[:, None]",
        f"head = (r % {spec.heads})[:, None]",
        f"p = tl.arange(0, {width})[None, :]",
        f"inside = asked[:, None] & (p < {pairs})",
        f"cos = tl.load(cosine + token * {pairs} + p, mask=inside, other=0.0)",
        f"sin = tl.load(sine + token * {pairs} + p, mask=inside, other=0.0)",
        f"start = x + token * {spec.token} + head * {spec.head}"
        + (f" + {spec.offset}" if spec.offset else ""),
        f"end = y + r.to(tl.int64)[:, None] * {spec.dim}",
    ]
    if spec.halves:
        lines += [
            "a = tl.load(start + p, mask=inside, other=0.0).to(tl.float32)",
            f"b = tl.load(start + {pairs} + p, mask=inside, other=0.0).to(tl.float32)",
            f"tl.store(end + p, (a * cos - b * sin).{cast}, mask=inside)",
            f"tl.store(end + {pairs} + p, (b * cos + a * sin).{cast}, mask=inside)",
        ]
    else:
        lines += [
            f"d = tl.arange(0, {2 * width})[None, :]",
            f"wide = asked[:, None] & (d < {spec.dim})",
            "both = tl.load(start + d, mask=wide, other=0.0).to(tl.float32)",
            f"a, b = tl.split(tl.reshape(both, [BLOCK_R, {width}, 2]))",
            "turned = tl.join(a * cos - b * sin, b * cos + a * sin)",
            f"turned = tl.reshape(turned, [BLOCK_R, {2 * width}])",
            f"tl.store(end + d, turned.{cast}, mask=wide)",
        ]
    pair = f"(p, p + {pairs})" if spec.halves else "(2p, 2p + 1)"
    moved = 2 * spec.heads * spec.dim * BYTES[spec.dtype] + 8 * pairs
    return f'''\
@triton.jit
def {name}(x, cosine, sine, y, rows, BLOCK_R: tl.constexpr):
    """y = (a cos - b sin, b cos + a sin) over the pairs (a, b) at {pair}.

    {spec.heads} heads of {spec.dim}.
    Tiling: a program owns BLOCK_R rows, each a head of a token; heads of a token share its tables.
    Bytes: {moved:,} a token. FLOPs: {3 * spec.heads * spec.dim:,} a token.
    Bound: memory, each operand once.
    """
{indented(lines, 1)}
'''
