"""The text that products share: what is loaded, the loop over K, what is stored.

Two forms. *Wide*: a tile of rows times a tile of weights, for many rows. *Thin*: weights are the
tensor cores' rows and tokens their columns, so that 16 tokens waste nothing and weights are read
at the speed of memory. In both, ``w_row`` is the first stored row of the tile's weights (of a
transposed part, ``w_k`` is), ``m0`` its first row of ``a``; rows from ``end`` on are not its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import indent

from backends.triton.families.formats import (
    BYTES,
    LANGUAGE,
    POWERS,
    SHORT,
    Quantised,
    power_of_two_helper,
)
from backends.triton.kernel import Argument, pointer, size
from backends.triton.targets import Target

DESCRIPTOR_ALIGNMENT = 16  # bytes: of a matrix' start and of its rows, for the copy engine


SCRATCH = (
    "scratch",
    '''
def scratch(size, alignment, stream):
    """Memory for the tensor descriptors that a launch's programs make."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
''',
)


@dataclass(frozen=True)
class Product:
    """``out[m, n] = sum_k a[m, k] * w[n, k]``, ``w`` a part of a stored matrix.

    Attributes:
        w_rows, w_columns: of the stored matrix; column: where ``k`` (of a transposed part: ``n``)
            begins in it.
        a_row: elements from one row of ``a`` to the next.
        out_row: elements from one row of ``out`` to the next.
        transposed: stored rows are summed: ``w[k, n]``.
        weights, activations: formats of quantised operands.
        dtype: of operands that are not quantised; ``out``: of the result.
        by_row: weights of one tile may have different scales.
        descriptors: tiles are fetched by the copy engine.
        scale_at: text of where in ``w_scales`` the tile's weights have their first scale.
    """

    n: int
    k: int
    w_rows: int
    w_columns: int
    column: int
    a_row: int
    out_row: int
    transposed: bool
    weights: Quantised | None
    activations: Quantised | None
    dtype: str
    out: str
    by_row: bool
    descriptors: bool
    scale_at: str
    block_k: int

    @property
    def scaled(self) -> bool:
        """Both operands are quantised: products run in 8 bits."""
        return self.weights is not None and self.activations is not None

    @property
    def halves(self) -> bool:
        """A wide tile may have two halves side by side, whose scales are next to each other.

        The products of a tile go to float32 sums every BLOCK_K; by halves, they need registers for
        half of them only. Scales that have to be decoded would need those registers.
        """
        formats = (self.weights, self.activations)
        decoded = any(f is not None and f.scale == POWERS for f in formats)
        tall = self.weights is not None and self.weights.rows == 128
        return self.scaled and tall and not (self.by_row or decoded)

    @property
    def a_dtype(self) -> str:
        return self.activations.element if self.activations else self.dtype

    @property
    def w_dtype(self) -> str:
        return self.weights.element if self.weights else self.dtype

    @property
    def k_tiles(self) -> int:
        return -(-self.k // self.block_k)

    @property
    def short(self) -> str:
        """In names of kernels."""
        given = self.weights.short if self.weights else SHORT[self.dtype]
        if self.weights and not self.activations:
            given += f"_by_{SHORT[self.dtype]}"
        return given + ("" if self.out == "bfloat16" else f"_{SHORT[self.out]}")

    def arguments(self, more: tuple[Argument, ...] = ()) -> tuple[Argument, ...]:
        """Of the kernel; ``more`` come before the number of rows."""
        taken = [pointer("a", self.a_dtype)]
        if self.activations:
            taken += [pointer("a_scales", self.activations.scale)]
            taken += [size("a_scales_row"), size("a_scales_tile")]
        taken += [pointer("w", self.w_dtype)]
        if self.weights:
            taken += [pointer("w_scales", self.weights.scale)]
        return (*taken, pointer("out", self.out), *more, size("rows"))

    def passed(self, more: str = "", strides: str = "*a_scales.stride()") -> str:
        """What a launcher passes."""
        taken = ["a"]
        if self.activations:
            taken += [_as_bytes(self.activations, "a_scales"), strides]
        taken += ["w"]
        if self.weights:
            taken += [_as_bytes(self.weights, "w_scales")]
        return ", ".join([*taken, "out", *([more] if more else []), "rows"])

    def parameters(self) -> str:
        """Of the launcher."""
        a = "a, a_scales" if self.activations else "a"
        return f"{a}, w, w_scales" if self.weights else f"{a}, w"

    def helpers(self, wide: bool = False) -> tuple[tuple[str, str], ...]:
        formats = (self.weights, self.activations)
        powers = any(f is not None and f.scale == POWERS for f in formats)
        found = (SCRATCH,) if wide and self.descriptors else ()
        return (*found, power_of_two_helper()) if powers else found

    def constants(self) -> str:
        return f"""\
N: tl.constexpr = {self.n}
K: tl.constexpr = {self.k}
BLOCK_K: tl.constexpr = {self.block_k}
K_TILES: tl.constexpr = {self.k_tiles}"""


def has_descriptors(
    target: Target, k: int, a_dtype: str, w_dtype: str, rows: tuple[int, ...], columns: int
) -> bool:
    """The copy engine can fetch these operands: rows (elements apart) start where it can read."""
    return (
        target.backend == "cuda"
        and int(target.arch) >= 90
        and k % DESCRIPTOR_ALIGNMENT == 0
        and all(row * BYTES[a_dtype] % DESCRIPTOR_ALIGNMENT == 0 for row in rows)
        and columns * BYTES[w_dtype] % DESCRIPTOR_ALIGNMENT == 0
    )


def _as_bytes(format: Quantised, name: str) -> str:
    return f"{name}.view(torch.uint8)" if format.scale == POWERS else name


def _number(format: Quantised, loaded: str) -> str:
    """A loaded scale as float32."""
    if format.scale == POWERS:
        return f"power_of_two({loaded})"
    return loaded if format.scale == "float32" else f"{loaded}.to(tl.float32)"


def _plus(*terms: str) -> str:
    return " + ".join(term for term in terms if term not in ("", "0"))


def lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def inside(text: str, depth: int) -> str:
    """Indented by so many levels."""
    return indent(text, "    " * depth)


def source(
    name: str, arguments: tuple[Argument, ...], parameters: list[str], about: str, body: str
) -> str:
    """The text of a kernel, ``about`` its docstring."""
    return lines(
        "@triton.jit",
        f"def {name}(",
        inside(", ".join(argument.name for argument in arguments) + ",", 1),
        inside(", ".join(f"{parameter}: tl.constexpr" for parameter in parameters) + ",", 1),
        "):",
        inside(f'"""{about}\n"""', 1),
        inside(body, 1),
    )


# -- wide ------------------------------------------------------------------------------------------


def wide_descriptors(p: Product, a_rows: str, a_columns: int) -> str:
    """Before the loop over tiles."""
    if not p.descriptors:
        return ""
    start = f"w + {p.column}" if p.column else "w"
    return f"""\
a_matrix = tl.make_tensor_descriptor(
    a, [{a_rows}, {a_columns}], [{p.a_row}, 1], [BLOCK_M, BLOCK_K]
)
w_matrix = tl.make_tensor_descriptor(
    {start}, [{p.w_rows}, K], [{p.w_columns}, 1], [BLOCK_N, BLOCK_K]
)"""


def wide_sums(p: Product, a_column: str = "", a_tile: str = "") -> str:
    """From ``m0``, ``end``, ``n0``, ``w_row`` to ``sums``, and ``more`` right of it.

    Args:
        a_column: text of the first column of ``a``; a_tile: of its first tile of scales.
    """
    loop = lines(_wide_a(p, a_column), _wide_half(p, "sums", 0))
    if p.halves:
        loop = lines(loop, "if HALVES == 2:", inside(_wide_half(p, "more", 1), 1))
    start = "m = m0 + tl.arange(0, BLOCK_M)"
    if not p.descriptors:
        start = lines(start, "part_k = tl.arange(0, BLOCK_K)", _wide_pointers(p, a_column))
    if p.activations:
        first = f"({a_tile}) * a_scales_tile" if a_tile else ""
        start = lines(start, f"a_scale_at = {_plus('a_scales + m * a_scales_row', first)}")
    if p.weights:
        start = lines(start, _scale_rows(p))
    zeros = "sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)"
    if p.halves:
        zeros = lines(zeros, "more = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)")
    return lines(start, zeros, "for k in tl.range(K_TILES):", inside(loop, 1))


def _scale_rows(p: Product) -> str:
    return f"w_scale_at = w_scales + {p.scale_at}"


def _wide_pointers(p: Product, a_column: str) -> str:
    at = f"a + m.to(tl.int64)[:, None] * {p.a_row} + part_k[None, :]"
    return f"""\
a_at = {_plus(at, a_column)}
w_at = {_plus(f"w + w_row.to(tl.int64) * {p.w_columns}", str(p.column))}
w_at += tl.arange(0, BLOCK_N)[:, None] * {p.w_columns} + part_k[None, :]"""


def _wide_a(p: Product, a_column: str) -> str:
    if p.descriptors:
        text = f"a_tile = a_matrix.load([m0, {_plus(a_column, 'k * BLOCK_K')}])"
    else:
        edge = " & (part_k < K - k * BLOCK_K)[None, :]" if p.k % p.block_k else ""
        text = f"a_tile = tl.load(a_at + k * BLOCK_K, (m < end)[:, None]{edge}, other=0.0)"
    if p.activations:
        zero = "0" if p.activations.scale == POWERS else "0.0"
        loaded = f"tl.load(a_scale_at + k * a_scales_tile, m < end, other={zero})"
        text = lines(text, f"a_scale = {_number(p.activations, loaded)}")
    return text


def _wide_half(p: Product, sums: str, half: int) -> str:
    right = " + BLOCK_N" if half else ""
    if p.descriptors:
        text = f"w_tile = w_matrix.load([w_row{right}, k * BLOCK_K])"
    else:
        n = f"(n0{right} + tl.arange(0, BLOCK_N) < N)[:, None]"
        edge = " & (part_k < K - k * BLOCK_K)[None, :]" if p.k % p.block_k else ""
        at = f"w_at{f' + BLOCK_N * {p.w_columns}' if half else ''} + k * BLOCK_K"
        text = f"w_tile = tl.load({at}, {n}{edge}, other=0.0)"
    if not p.scaled:
        return lines(text, f"{sums} = tl.dot(a_tile, w_tile.T, {sums})")
    assert p.weights is not None
    across = p.weights.scales(p.w_rows, p.w_columns)[1]
    step = _scale_step(p)
    if p.by_row:
        scale = _number(p.weights, f"tl.load(w_scale_at + {step}, {_n_inside(p, right)}, other=0)")
        factor = "(a_scale[:, None] * w_scale[None, :])"
    else:
        down = f" + BLOCK_N // {p.weights.rows} * {across}" if half else ""
        there = ", n0 + BLOCK_N < N, other=0.0" if half else ""  # the right half may not exist
        scale = _number(p.weights, f"tl.load(w_scale_at{down} + {step}{there})")
        factor = "(a_scale * w_scale)[:, None]"
    return lines(text, f"w_scale = {scale}", f"{sums} += tl.dot(a_tile, w_tile.T) * {factor}")


def _bracketed(sum: str) -> str:
    return f"({sum})" if " " in sum else sum


def _n_inside(p: Product, right: str = "") -> str:
    return f"n0{right} + tl.arange(0, BLOCK_N) < N"


def _scale_step(p: Product) -> str:
    """The tile of scales along K that the loop is at."""
    assert p.weights is not None
    if p.transposed:
        across = p.weights.scales(p.w_rows, p.w_columns)[1]
        return f"(w_k + k * BLOCK_K) // {p.weights.rows} * {across}"
    return "k" if p.weights.columns == p.block_k else f"k * BLOCK_K // {p.weights.columns}"


def wide_store(p: Product, out_column: str = "") -> str:
    column = _bracketed(_plus(out_column, "n"))
    out = LANGUAGE[p.out]
    text = f"""\
n = n0 + tl.arange(0, BLOCK_N)
out_at = out + m.to(tl.int64)[:, None] * {p.out_row} + {column}[None, :]
tl.store(out_at, sums.to({out}), (m < end)[:, None] & (n < N)[None, :])"""
    if p.halves:
        text += f"""
if HALVES == 2:
    right = (m < end)[:, None] & (n + BLOCK_N < N)[None, :]
    tl.store(out_at + BLOCK_N, more.to({out}), right)"""
    return text


# -- thin ------------------------------------------------------------------------------------------


def thin_sums(p: Product, first: str, last: str, a_column: str = "", a_tile: str = "") -> str:
    """From ``m0``, ``end``, ``n0``, ``w_row`` (transposed: ``w_k``) to ``sums[n, m]``."""
    at = f"a + m.to(tl.int64)[None, :] * {p.a_row} + part_k[:, None]"
    start = f"""\
m = m0 + tl.arange(0, BLOCK_M)
n = n0 + tl.arange(0, BLOCK_N)
part_k = tl.arange(0, BLOCK_K)
a_at = {_plus(at, a_column)}
"""
    if p.transposed:
        start += f"""\
w_at = {_plus(f"w + w_k.to(tl.int64) * {p.w_columns}", str(p.column))}
w_at += part_k[:, None] * {p.w_columns} + n[None, :]"""
    else:
        start += f"""\
w_at = {_plus(f"w + w_row.to(tl.int64) * {p.w_columns}", str(p.column))}
w_at += tl.arange(0, BLOCK_N)[:, None] * {p.w_columns} + part_k[None, :]"""
    if p.activations:
        tile = f"({a_tile}) * a_scales_tile" if a_tile else ""
        start = lines(start, f"a_scale_at = {_plus('a_scales + m * a_scales_row', tile)}")
    if p.weights:
        start = lines(start, _scale_rows(p))
    return lines(
        start,
        "sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)",
        f"for k in tl.range({first}, {last}):",
        inside(_thin_loop(p), 1),
    )


def _thin_loop(p: Product) -> str:
    edge = "part_k < K - k * BLOCK_K" if p.k % p.block_k else ""
    a_edge = f" & ({edge})[:, None]" if edge else ""
    if p.transposed:
        w_edge = f" & ({edge})[:, None]" if edge else ""
        rows = str(p.w_columns)
        if p.k * p.w_columns >= 1 << 31:  # k is an int32
            rows = f"tl.full((), {rows}, tl.int64)"
        load = f"tl.load(w_at + k * BLOCK_K * {rows}, (n < N)[None, :]{w_edge}, other=0.0)"
        w_tile = "w_tile.T"
    else:
        w_edge = f" & ({edge})[None, :]" if edge else ""
        load = f"tl.load(w_at + k * BLOCK_K, (n < N)[:, None]{w_edge}, other=0.0)"
        w_tile = "w_tile"
    text = lines(
        f"w_tile = {load}",
        f"a_tile = tl.load(a_at + k * BLOCK_K, (m < end)[None, :]{a_edge}, other=0.0)",
    )
    if p.weights is None:
        return lines(text, f"sums = tl.dot({w_tile}, a_tile, sums)")
    factor = "w_scale"
    if p.by_row:
        loaded = f"tl.load(w_scale_at + {_scale_step(p)}, n < N, other=0)"
        factor = "w_scale[:, None]"
    else:
        loaded = f"tl.load(w_scale_at + {_scale_step(p)})"
    text = lines(text, f"w_scale = {_number(p.weights, loaded)}")
    if p.activations is None:
        wide = f"{w_tile}.to({LANGUAGE[p.dtype]})"  # exact: every code is a number of the dtype
        return lines(text, f"sums += tl.dot({wide}, a_tile) * {factor}")
    zero = "0" if p.activations.scale == POWERS else "0.0"
    loaded = f"tl.load(a_scale_at + k * a_scales_tile, m < end, other={zero})"
    both = "(a_scale * w_scale)[None, :]"
    if p.by_row:
        both = "(a_scale[None, :] * w_scale[:, None])"
    return lines(
        text,
        f"a_scale = {_number(p.activations, loaded)}",
        f"sums += tl.dot({w_tile}, a_tile) * {both}",
    )


def thin_store(p: Product, out_column: str = "") -> str:
    return f"""\
out_at = out + m.to(tl.int64)[None, :] * {p.out_row} + {_bracketed(_plus(out_column, "n"))}[:, None]
mine = (m < end)[None, :] & (n < N)[:, None]
tl.store(out_at, sums.to({LANGUAGE[p.out]}), mine)"""
