"""Attention of many queries: prompts, whole or in chunks, of a ragged batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from backends.triton.families.attention import (
    LOG2_E,
    AttentionSpec,
    Operands,
    Tile,
    column,
    head_offset,
    indented,
    maths,
    score_lines,
    softmax_step,
    state_lines,
    sums,
    visible_text,
    within,
)
from backends.triton.families.attention_example import example
from backends.triton.kernel import Argument, Config, Kernel, Operator, Traffic, pointer, size
from backends.triton.targets import SM_100, Target

CACHE = 50e6  # bytes of L2: H100
PROCESSORS = 132
WIDE = 1024  # scores of a tile in float32, whose products are unrolled into single operations


def generate(spec: AttentionSpec, target: Target) -> Operator:
    """The kernel for packed queries: token i of a sequence of ``n`` queries and ``m`` positions
    stands at position ``m - n + i``, so a prompt may come in chunks."""
    name = spec.name("prefill_attention")
    ordered = tuple(candidates(spec, target))
    ops = Operands(spec)
    arguments = (
        *ops.pointers(),
        pointer("out", spec.dtype),
        pointer("q_offsets", "int32"),
        *([pointer("k_offsets", "int32")] if spec.packed else [pointer("lengths", "int32")]),
        *([pointer("page_table", "int32"), size("table_width")] if spec.paged else []),
    )
    source = _source(spec, ops, f"{name}_kernel", arguments)
    kernel = Kernel(f"{name}_kernel", source, arguments, ordered[:1], ordered[1:])
    shown = {"tokens": 4096, "history": 4096, "sequences": 1}
    return Operator(
        name=name,
        kernels=(kernel,),
        launcher=_launcher(spec, name, arguments),
        traffic=lambda sizes: traffic(spec, sizes, ordered[0]),
        shown=shown,
        dense=spec.dense,
        example=lambda sizes, device: tuple(
            example(spec, [*tensors(arguments), "most_queries"], sizes, device).values()
        ),
    )


def traffic(spec: AttentionSpec, sizes: Mapping[str, int], config: Config) -> Traffic:
    """What a call moves: ``tokens`` queries of ``sequences`` with ``history`` positions each.

    Tiles of one head's queries run side by side and read the same keys, which the L2 cache holds if
    those of the heads that run at once fit.
    """
    tokens, history, sequences = sizes["tokens"], sizes["history"], sizes["sequences"]
    queries = tokens * spec.query_bytes
    keys = sequences * history * spec.token_bytes
    each = -(-tokens // sequences)
    tiles = max(1, -(-each // config.constants["BLOCK_M"]))
    active = min(-(-PROCESSORS // tiles), sequences * spec.heads)
    working = active * history * spec.token_bytes / max(spec.kv_heads, 1)
    passes = 1 if working <= CACHE else min(tiles, working / CACHE)
    pairs = sequences * _pairs(spec, each, history)
    flops = pairs * spec.pair_flops
    return Traffic(queries + keys * passes, queries + keys, flops)


def _pairs(spec: AttentionSpec, queries: int, history: int) -> float:
    """Pairs of a query and a position that it sees."""
    least, beyond = spec.visible or (None, None)
    total = 0.0
    for i in (0, queries - 1):  # the first and the last; between them it is linear, near enough
        position = history - queries + i
        high = history if least is None else min(history, max(0, position - least + 1))
        low = 0 if beyond is None else min(high, max(0, position - beyond + 1))
        total += high - low
    return total / 2 * queries


def candidates(spec: AttentionSpec, target: Target) -> Iterator[Config]:
    """Tilings that fit, the most promising first.

    A tensor core reads keys and values from shared memory once for each 64 queries of a tile, so
    what counts is that the tile is tall, then that the loop is short, as long as sums and scores
    fit into registers and the tiles into shared memory.
    """
    found = []
    for block_m in (128, 64, 32, 16):
        for block_n in (128, 64, 32):
            for warps in (4, 8):
                for stages in (2, 3):
                    config = Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages)
                    if fits(spec, target, block_m, block_n, warps, stages):
                        found.append((_time(spec, block_m, block_n, warps, stages), config))
    if not found:
        yield Config({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1)
    yield from (config for _, config in sorted(found, key=lambda pair: pair[0]))


def fits(
    spec: AttentionSpec, target: Target, block_m: int, block_n: int, warps: int, stages: int
) -> bool:
    """Do tiles fit into shared memory, and sums and scores into registers?"""
    ops = Operands(spec)
    queries = sum(query.chunk.width for query, _ in ops.scores)
    loaded = sum(tile.chunk.width for tile in ops.loads)
    values = sum(tile.chunk.width for tile in ops.values)
    shared = spec.width * (block_m * queries + stages * block_n * loaded)
    threads = warps * target.warp
    if spec.dtype == "float32" and block_m * block_n > WIDE:
        return False
    if target is SM_100 and block_m * block_n > 128 * 64:
        return False  # scores come back from tensor memory all at once
    registers = (block_m * values + 1.75 * block_m * block_n) / threads + 40
    return shared <= 0.98 * target.shared and registers <= 192 and block_m * 4 >= warps * 16


def _time(spec: AttentionSpec, block_m: int, block_n: int, warps: int, stages: int) -> float:
    """Relative time per pair of query and position."""
    idle = 1 + 0.3 * (block_m < 64 * warps // 4) + 0.15 * (warps == 4) + 0.05 * (stages < 3)
    return idle * (1 / 64 + 1 / block_m) * (1 + 16 / block_n)


def _source(spec: AttentionSpec, ops: Operands, name: str, arguments: tuple[Argument, ...]) -> str:
    parameters = ", ".join(argument.name for argument in arguments)
    sink = "tl.load(sink + head).to(tl.float32)"
    first = "keys_first + " if spec.packed else ""
    lines = [
        *_range(spec),
        "",
        "i = tile * BLOCK_M + tl.arange(0, BLOCK_M)",
        "asked = i < queries",
        "position = start + i",
        "n = tl.arange(0, BLOCK_N)",
        *ops.columns(),
        "row = (first + i).to(tl.int64)[:, None]",
        *(line for query, _ in ops.scores for line in _query(spec, query)),
        *state_lines(ops, "BLOCK_M"),
        *([f"peak = total + {sink} * {LOG2_E!r}", "total += 1.0"] if spec.sink else []),
        "",
        *_phases(spec),
    ]
    body = [
        "inside = s + n < history",
        *_rows(spec, first),
        *(line for tile in ops.loads for line in _load(spec, tile)),
        *score_lines(spec, ops),
        *_mask(spec),
        *softmax_step(spec, ops),
    ]
    lines += [
        "    for s in tl.range(lower, upper, BLOCK_N):",
        *(f"        {line}" for line in body),
        "",
        "share = 1.0 / tl.where(total == 0.0, 1.0, total)  # who sees nothing gives zeros",
    ]
    for tile in ops.values:
        at = f"row * {spec.heads * spec.held.dim} + head * {spec.held.dim} + {column(tile)}"
        result = f"({sums(tile)} * share[:, None]).to(out.dtype.element_ty)"
        lines.append(f"tl.store(out + {at}, {result}, mask={within(tile, 'asked')})")
    return f"""\
@triton.jit
def {name}(
    {parameters},
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
{_docstring(spec)}
{indented(lines, 1)}
"""


def _docstring(spec: AttentionSpec) -> str:
    dims = f"{spec.score_dim}/{spec.held.dim}"
    sees = "over every j"
    if spec.visible is not None:
        least, beyond = spec.visible
        bounds = [f"i - j >= {least}"] if least is not None else []
        bounds += [f"i - j < {beyond}"] if beyond is not None else []
        sees = f"over j with {' and '.join(bounds)}"
    return f'''\
    """{maths(spec)}, {sees}.

    {spec.heads} heads of {dims}, {spec.kv_heads} of keys and values. Queries are packed, sequence
    after sequence; they are the last positions of their histories.
    Tiling: a program owns BLOCK_M queries of one head and sequence, and walks over the positions
    they see, BLOCK_N at a time; scores and probabilities never leave registers. Tiles that the mask
    does not cut are taken without it. The tiles that see most start first.
    Bytes: {spec.query_bytes:,} a query, read and written once,
    and {spec.token_bytes:,} a position, read from memory once: tiles of a head share it in L2.
    FLOPs: {spec.pair_flops:,} for each pair of a query and a position it sees.
    Bound: tensor cores, from some hundred positions on.
    """'''


def _range(spec: AttentionSpec) -> list[str]:
    """Which tile this is, and which positions any of its queries sees."""
    least, beyond = spec.visible or (None, None)
    lines = [
        "tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last see most: they start first",
        "head = tl.program_id(1)",
        "sequence = tl.program_id(2)",
        "first = tl.load(q_offsets + sequence)",
        "queries = tl.load(q_offsets + sequence + 1) - first",
        "if tile * BLOCK_M >= queries:",
        "    return",
    ]
    if spec.packed:
        lines += [
            "keys_first = tl.load(k_offsets + sequence)",
            "history = tl.load(k_offsets + sequence + 1) - keys_first",
        ]
    else:
        lines.append("history = tl.load(lengths + sequence)")
    lines += [
        "start = history - queries  # the position of the sequence's first query",
        "low = start + tile * BLOCK_M  # positions of the tile's queries: low .. high",
        "high = tl.minimum(low + BLOCK_M, history) - 1",
    ]
    lines.append(
        "end = history"
        if least is None
        else f"end = tl.maximum(tl.minimum(history, high + {1 - least}), 0)"
    )
    lines.append(
        "begin = 0"
        if beyond is None
        else f"begin = tl.maximum(low - {beyond - 1}, 0) // BLOCK_N * BLOCK_N"
    )
    return lines


def _phases(spec: AttentionSpec) -> list[str]:
    """The loop over phases: a window's far edge, what all queries see, and the near edge."""
    least, beyond = spec.visible or (None, None)
    whole_end = "history" if least is None else f"tl.minimum(low + {1 - least}, history)"
    lines = [f"near = tl.maximum({whole_end}, 0) // BLOCK_N * BLOCK_N"]
    if beyond is None:
        lines += [
            "near = tl.minimum(near, end)",
            "# Positions that all queries of the tile see, then those that some do.",
            "for cut in tl.static_range(2):",
            "    lower = near if cut else 0",
            "    upper = end if cut else near",
        ]
        return lines
    return [
        f"far = tl.cdiv(tl.maximum(high - {beyond - 1}, 0), BLOCK_N) * BLOCK_N",
        "far = tl.maximum(tl.minimum(far, end), begin)",
        *lines,
        "near = tl.maximum(tl.minimum(near, end), far)",
        "# Positions too old for some queries, those that all see, and those too new for some.",
        "for phase in tl.static_range(3):",
        "    cut = phase != 1",
        "    lower = begin if phase == 0 else far if phase == 1 else near",
        "    upper = far if phase == 0 else near if phase == 1 else end",
    ]


def _mask(spec: AttentionSpec) -> list[str]:
    conditions = ["inside[None, :]", *visible_text(spec, "gap")]
    lines = ["if cut:"]
    if len(conditions) > 1:
        lines.append("    gap = position[:, None] - (s + n)[None, :]")
    seen = " & ".join(conditions)
    return [*lines, f"    seen = {seen}", '    scores = tl.where(seen, scores, float("-inf"))']


def _query(spec: AttentionSpec, tile: Tile) -> list[str]:
    rows = tile.rows
    at = f"row * {rows.token}{head_offset(rows, 'head', spec.heads)} + {column(tile)}"
    return [f"{tile.name} = tl.load({tile.tensor} + {at}, mask={within(tile, 'asked')}, other=0.0)"]


def _rows(spec: AttentionSpec, first: str) -> list[str]:
    """Where the tile's positions lie: a row of the packed tensors, one of the cache's pages."""
    lines = [f"key_row = ({first}s + n).to(tl.int64)[:, None]"] if spec.packed else []
    if spec.paged:
        lines += page_lines(spec.page, "inside")
    return lines


def page_lines(page: int, valid: str) -> list[str]:
    """Rows of the cache for positions ``s + n``; one page for all, where tiles lie within pages."""
    return [
        f"if {page} % BLOCK_N == 0:",
        f"    page = tl.load(page_table + sequence * table_width + s // {page}).to(tl.int64)",
        f"    cache_row = (page * {page} + s % {page} + n)[:, None]",
        "else:",
        f"    entry = page_table + sequence * table_width + (s + n) // {page}",
        f"    page = tl.load(entry, mask={valid}, other=0).to(tl.int64)",
        f"    cache_row = (page * {page} + (s + n) % {page})[:, None]",
    ]


def _load(spec: AttentionSpec, tile: Tile) -> list[str]:
    row = "cache_row" if tile.rows.paged else "key_row"
    at = f"{row} * {tile.rows.token}{head_offset(tile.rows, 'head', spec.heads)} + {column(tile)}"
    return [
        f"{tile.name} = tl.load({tile.tensor} + {at}, mask={within(tile, 'inside')}, other=0.0)"
    ]


def tensors(arguments: tuple[Argument, ...]) -> list[str]:
    """The launcher's parameters: what it does not allocate."""
    own = ("out", "partial", "weight", "table_width")
    return [argument.name for argument in arguments if argument.name not in own]


def _launcher(spec: AttentionSpec, name: str, arguments: tuple[Argument, ...]) -> str:
    query = f"q_{spec.terms[0].name}"
    sequences = "k_offsets.numel() - 1" if spec.packed else "lengths.numel()"
    width = {"table_width": "page_table.stride(0)"}
    passed = ", ".join(width.get(a.name, a.name) for a in arguments)
    places = "k_offsets: int32 [sequences + 1]" if spec.packed else "lengths: int32 [sequences]"
    table = "; page_table: int32 [sequences, pages]" if spec.paged else ""
    return f'''\
def {name}({", ".join(tensors(arguments))}, most_queries):
    """{maths(spec)} over packed queries.

    q_offsets: int32 [sequences + 1], of the queries; {places}, of the histories{table}.
    most_queries: of any sequence. Returns [queries, {spec.heads}, {spec.held.dim}].
    """
    shape = ({query}.shape[0], {spec.heads}, {spec.held.dim})
    out = torch.empty(shape, dtype={query}.dtype, device={query}.device)
    if most_queries == 0:
        return out
    config = pick({name}_kernel_configs, most_queries)
    grid = (triton.cdiv(most_queries, config["BLOCK_M"]), {spec.heads}, {sequences})
    {name}_kernel[grid]({passed}, **config)
    return out
'''
