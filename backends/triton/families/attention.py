"""What attention kernels share: what is asked for, where tensors lie, how head dims are tiled.

The maths is that of the graph's ``attention``: a softmax over the history of a scaled sum of score
products, times a value. A term's key, or the value, has a head for each query head, one for each
group of query heads, or one for all; a key may be the value as well. Multi-head, grouped-query,
multi-query and latent attention are this with other numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2

from backends.triton.kernel import TRITON_DTYPES, Argument, pointer

LOG2_E = 1.4426950408889634
LEAST = 16  # numbers: the shortest side of a tensor core's product


@dataclass(frozen=True)
class Rows:
    """Where the numbers of a token lie.

    Attributes:
        heads: heads of the tensor: 1 where all share it.
        dim: numbers of a head.
        token_stride: numbers from one token to the next; those of its heads unless given.
        head_stride: numbers from one head to the next; those of a head unless given.
        paged: tokens lie in the pages of a cache, found through a page table; else sequence after
            sequence, without gaps.
    """

    heads: int
    dim: int
    token_stride: int = 0
    head_stride: int = 0
    paged: bool = False

    @property
    def token(self) -> int:
        return self.token_stride or self.heads * self.head

    @property
    def head(self) -> int:
        return self.head_stride or self.dim


@dataclass(frozen=True)
class Term:
    """One product of the scores: query times key, summed over ``query.dim``."""

    name: str
    query: Rows
    key: Rows


@dataclass(frozen=True)
class AttentionSpec:
    """One attention of a model.

    Attributes:
        heads: of the queries and of the result.
        terms: whose sum the scores are.
        value: where the value lies, or the number of the term whose key it is.
        scale: what the sum is multiplied by.
        visible: (least, beyond): position p sees q where least <= p - q < beyond, None: no bound.
            (0, None) is causal, (0, 4096) a window. None: everything is seen.
        dtype: of all tensors; scores, probabilities and sums are float32.
        page: positions in a page.
        score: statements that change ``scores``, scaled, before what is not seen is hidden.
        sink: dtype of one more logit of each head in the softmax, which gives no value; "": none.
    """

    heads: int
    terms: tuple[Term, ...]
    value: Rows | int
    scale: float
    visible: tuple[int | None, int | None] | None = (0, None)
    dtype: str = "bfloat16"
    page: int = 64
    score: tuple[str, ...] = ()
    sink: str = ""

    def __post_init__(self) -> None:
        for term in self.terms:
            if term.query.dim != term.key.dim:
                raise ValueError(f"{term.name}: {term.query.dim} and {term.key.dim} to be summed")
            if term.query.heads != self.heads or term.query.paged:
                raise ValueError(f"{term.name}: queries are packed and have {self.heads} heads")
        for rows in self.stored:
            if self.heads % rows.heads or self.kv_heads % rows.heads:
                raise ValueError(f"{rows.heads} heads do not divide {self.heads}")

    @property
    def held(self) -> Rows:
        """Where the value lies."""
        return self.terms[self.value].key if isinstance(self.value, int) else self.value

    @property
    def stored(self) -> tuple[Rows, ...]:
        """Keys and values, each once."""
        keys = tuple(term.key for term in self.terms)
        return keys if isinstance(self.value, int) else (*keys, self.value)

    @property
    def kv_heads(self) -> int:
        """Heads with keys or a value of their own."""
        return max(rows.heads for rows in self.stored)

    @property
    def group(self) -> int:
        """Query heads that read the same keys and values."""
        return self.heads // self.kv_heads

    @property
    def paged(self) -> bool:
        return any(rows.paged for rows in self.stored)

    @property
    def packed(self) -> bool:
        """Some keys or values lie sequence after sequence."""
        return not all(rows.paged for rows in self.stored)

    @property
    def score_dim(self) -> int:
        return sum(term.query.dim for term in self.terms)

    @property
    def dense(self) -> bool:
        """No tensor is a part of a wider one."""
        operands = (*self.stored, *(term.query for term in self.terms))
        return not any(rows.token_stride or rows.head_stride for rows in operands)

    @property
    def query_bytes(self) -> int:
        """Bytes of a query and its result, all heads."""
        return self.heads * (self.score_dim + self.held.dim) * self.width

    @property
    def pair_flops(self) -> int:
        """FLOPs for a query and a position that it sees, all heads."""
        return 2 * self.heads * (self.score_dim + self.held.dim)

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one position, all heads."""
        return sum(rows.heads * rows.dim for rows in self.stored) * self.width

    def name(self, kind: str) -> str:
        """A kernel's name: heads, dims, and a mark of all else that is specialised."""
        dims = "_".join(str(term.query.dim) for term in self.terms)
        mark = hashlib.sha256(repr(self).encode()).hexdigest()[:6]
        return f"{kind}_h{self.heads}k{self.kv_heads}_q{dims}_v{self.held.dim}_{mark}"


@dataclass(frozen=True)
class Chunk:
    """Numbers ``start`` .. ``start + valid`` of a head, in a tile ``width`` wide (a power of 2)."""

    start: int
    valid: int
    width: int

    @property
    def whole(self) -> bool:
        return self.valid == self.width


def chunks(dim: int) -> tuple[Chunk, ...]:
    """A head dim as at most two tiles: 192 is 128 and 64, 576 is 512 and 64, 100 is most of 128."""
    first = max(1 << (dim.bit_length() - 1), LEAST)
    rest = dim - first
    if rest <= 0:
        return (Chunk(0, dim, first),)
    second = max(1 << (rest - 1).bit_length(), LEAST)
    if second >= first:
        return (Chunk(0, dim, 2 * first),)
    return (Chunk(0, first, first), Chunk(first, rest, second))


@dataclass(frozen=True)
class Tile:
    """A chunk of a tensor as the text names it.

    Attributes:
        tensor: the pointer's name.
        name: of the loaded tile.
    """

    tensor: str
    name: str
    rows: Rows
    chunk: Chunk

    @property
    def columns(self) -> str:
        """The name of the tile's column numbers."""
        return f"d{self.chunk.width}"


def tiles(tensor: str, rows: Rows) -> tuple[Tile, ...]:
    return tuple(Tile(tensor, f"{tensor}_{part.start}", rows, part) for part in chunks(rows.dim))


class Operands:
    """The tiles of an attention, by what they are used for.

    Attributes:
        scores: (query tile, key tile) of each product that the scores are a sum of.
        loads: every key and value tile, each once.
        values: the value's tiles, which may be a term's key tiles.
    """

    def __init__(self, spec: AttentionSpec):
        self.spec = spec
        keys = [tiles(f"k_{term.name}", term.key) for term in spec.terms]
        queries = [tiles(f"q_{term.name}", term.query) for term in spec.terms]
        pairs = zip(queries, keys, strict=True)
        self.scores = [pair for q, k in pairs for pair in zip(q, k, strict=True)]
        shared = isinstance(spec.value, int)
        self.values = keys[spec.value] if isinstance(spec.value, int) else tiles("v", spec.value)
        self.keys = [key for _, key in self.scores]
        self.loads = [*self.keys, *([] if shared else self.values)]

    def pointers(self) -> list[Argument]:
        names = [q.tensor for q, _ in self.scores] + [tile.tensor for tile in self.loads]
        found = [pointer(name, self.spec.dtype) for name in dict.fromkeys(names)]
        return found + ([pointer("sink", self.spec.sink)] if self.spec.sink else [])

    def columns(self) -> Iterator[str]:
        widths = {tile.chunk.width for tile in (*self.loads, *self.values)}
        for width in sorted(widths, reverse=True):
            yield f"d{width} = tl.arange(0, {width})"


def column(tile: Tile) -> str:
    """The column numbers of a tile within a head, as a row."""
    start = f" + {tile.chunk.start}" if tile.chunk.start else ""
    return f"({tile.columns}{start})[None, :]" if start else f"{tile.columns}[None, :]"


def within(tile: Tile, rows: str) -> str:
    """The mask of a load: valid rows, and valid columns where the tile is wider than the head."""
    if tile.chunk.whole:
        return f"{rows}[:, None]"
    return f"{rows}[:, None] & ({tile.columns} < {tile.chunk.valid})[None, :]"


def head_offset(rows: Rows, head: str, heads: int) -> str:
    """`` + head * stride``, for a tensor of fewer heads; nothing where all share it."""
    if rows.heads == 1:
        return ""
    each = heads // rows.heads
    index = head if each == 1 else f"({head} // {each})"
    return f" + {index} * {rows.head}"


def softmax_step(spec: AttentionSpec, ops: Operands) -> list[str]:
    """One tile of keys, its scores masked already: the running softmax, and the value's sums."""
    precision = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    out = [
        "highest = tl.maximum(peak, tl.max(scores, 1))",
        "# A row that has seen nothing yet: -inf less -inf would be NaN.",
        'shift = tl.where(highest == float("-inf"), 0.0, highest)',
        "decay = tl.exp2(peak - shift)",
        "p = tl.exp2(scores - shift[:, None])",
        "total = total * decay + tl.sum(p, 1)",
    ]
    cast = f"p.to(tl.{TRITON_NAMES[spec.dtype]})"
    out.append(f"weights = {cast}")
    out += [
        f"{sums(tile)} = tl.dot(weights, {tile.name}, {sums(tile)} * decay[:, None]{precision})"
        for tile in ops.values
    ]
    return [*out, "peak = highest"]


def score_lines(spec: AttentionSpec, ops: Operands) -> list[str]:
    precision = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    out = []
    for number, (query, key) in enumerate(ops.scores):
        more = ", scores" if number else ""
        product = f"tl.dot({query.name}, tl.trans({key.name}){more}{precision})"
        out.append(f"scores = {product}")
    if spec.score:
        return [
            *out,
            f"scores *= {spec.scale!r}",
            *spec.score,
            f"scores *= {LOG2_E!r}  # exp2 is one operation",
        ]
    return [
        *out,
        f"scores *= {spec.scale * LOG2_E!r}  # the scale, and log2(e): exp2 is one operation",
    ]


def sums(tile: Tile) -> str:
    return f"sum_{tile.chunk.start}"


def state_lines(ops: Operands, rows: str) -> list[str]:
    """The running softmax before any key."""
    return [
        f'peak = tl.full([{rows}], float("-inf"), tl.float32)',
        f"total = tl.zeros([{rows}], tl.float32)",
        *(f"{sums(t)} = tl.zeros([{rows}, {t.chunk.width}], tl.float32)" for t in ops.values),
    ]


def visible_text(spec: AttentionSpec, gap: str) -> list[str]:
    """Conditions on how far a key lies before its query."""
    least, beyond = spec.visible or (None, None)
    out = [f"({gap} >= {least})"] if least is not None else []
    return out + ([f"({gap} < {beyond})"] if beyond is not None else [])


def indented(lines: list[str], depth: int) -> str:
    return "\n".join(" " * 4 * depth + line if line else "" for line in lines)


def maths(spec: AttentionSpec) -> str:
    """The docstring's formula."""
    products = " + ".join(f"q_{t.name}[i] · k_{t.name}[j]" for t in spec.terms)
    value = f"k_{spec.terms[spec.value].name}" if isinstance(spec.value, int) else "v"
    score = f"{spec.scale:.6g} ({products})"
    score = f"f({score})" if spec.score else score
    beside = " beside a sink of each head" if spec.sink else ""
    return f"out[i] = sum_j softmax_j({score}) {value}[j]{beside}"


TRITON_NAMES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
assert TRITON_NAMES.keys() <= TRITON_DTYPES.keys()


def power(x: float) -> int:
    """The least power of two that is at least x."""
    return 1 << max(0, -int(-log2(max(x, 1)) // 1))
