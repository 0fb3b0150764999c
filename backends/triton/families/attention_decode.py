"""Attention of few queries over long histories: decoding, with or without speculation.

The history of a sequence is split over programs; a second kernel adds what they found.
"""

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
from backends.triton.families.attention_prefill import (
    CACHE,
    PROCESSORS,
    WIDE,
    page_lines,
    tensors,
)
from backends.triton.kernel import Argument, Config, Kernel, Operator, Traffic, pointer, size
from backends.triton.targets import SM_90, SM_100, Target

MOST_SPLITS = 64
SHORTEST_SPLIT = 256  # positions: shorter ones are not worth a program and its partial sums


def generate(spec: AttentionSpec, target: Target) -> Operator:
    """The kernels for packed queries of which each sequence has one or a few."""
    name = spec.name("decode_attention")
    ordered = tuple(candidates(spec, target))
    ops = Operands(spec)
    arguments = (
        *ops.pointers(),
        pointer("out", spec.dtype),
        pointer("weight", "float32"),
        pointer("q_offsets", "int32"),
        *([pointer("k_offsets", "int32")] if spec.packed else [pointer("lengths", "int32")]),
        *([pointer("page_table", "int32"), size("table_width")] if spec.paged else []),
    )
    source = _source(spec, ops, f"{name}_kernel", arguments)
    split = Kernel(f"{name}_kernel", source, arguments, ordered[:1], ordered[1:])
    adding = _reduction(spec, f"{name}_reduction")
    shown = {"tokens": 64, "history": 4096, "sequences": 64}
    return Operator(
        name=name,
        kernels=(split, adding),
        launcher=_launcher(spec, name, arguments, resident(spec, target, ordered[0])),
        traffic=lambda sizes: traffic(spec, sizes, ordered[0]),
        shown=shown,
        dense=spec.dense,
        example=lambda sizes, device: tuple(
            example(spec, [*tensors(arguments), *_more(spec)], sizes, device).values()
        ),
    )


def resident(spec: AttentionSpec, target: Target, config: Config) -> int:
    """Programs that run on one processor at once, as far as shared memory and threads decide."""
    threads = config.num_warps * target.warp
    return max(
        1, min(target.shared // max(shared_bytes(spec, target, config), 1), 1024 // threads, 4)
    )


def shared_bytes(spec: AttentionSpec, target: Target, config: Config) -> int:
    """Shared memory of a program, about. Blackwell's products want a key that is the value as well
    in two layouts."""
    ops = Operands(spec)
    queries = sum(query.chunk.width for query, _ in ops.scores)
    loaded = sum(tile.chunk.width for tile in ops.loads)
    tiles = config.constants
    loads = config.num_stages * tiles["BLOCK_N"] * loaded
    if target is SM_100 and isinstance(spec.value, int):
        values = sum(tile.chunk.width for tile in ops.values)
        loads += 2 * tiles["BLOCK_N"] * (1 << (values - 1).bit_length())
    return spec.width * (tiles["BLOCK_M"] * queries + loads)


def splits(spec: AttentionSpec, programs: int, history: int, processors: int = PROCESSORS) -> int:
    """Over how many programs each history is split.

    Time is that of the last program to end: how full the waves of programs are, and for each split
    its partial sums, which are written and read again, beside the history, which is read once.
    """
    most = max(1, min(MOST_SPLITS, history // SHORTEST_SPLIT))

    def time(count: int) -> float:
        waves = -(-programs * count // processors) * processors / (programs * count)
        return waves + (count * _partial_share(spec) / history if count > 1 else 0.0)

    return min(range(1, most + 1), key=time)


def _partial_share(spec: AttentionSpec) -> float:
    """Positions of the history whose bytes are those of a split's partial sums, moved twice."""
    return 2 * spec.heads * (spec.held.dim * spec.width + 4) / spec.token_bytes


def traffic(spec: AttentionSpec, sizes: Mapping[str, int], config: Config) -> Traffic:
    """What a call moves.

    Programs of one sequence read the same history side by side, through L2. Partial sums that take
    a quarter of L2 or less are read back before they leave it, and the next call's replace them.
    """
    tokens, history, sequences = sizes["tokens"], sizes["history"], sizes["sequences"]
    tiles = -(-tokens // sequences * spec.group // -config.constants["BLOCK_M"])
    programs = max(1, -tiles) * spec.kv_heads * sequences
    count = splits(spec, programs, history, PROCESSORS * resident(spec, SM_90, config))
    queries = tokens * spec.query_bytes
    seen = history
    if spec.visible and spec.visible[1] is not None:
        seen = min(history, spec.visible[1] + -(-tokens // sequences) - 1)
    keys = sequences * seen * spec.token_bytes
    partial = (
        0 if count == 1 else 2 * tokens * spec.heads * count * (spec.held.dim * spec.width + 4)
    )
    if partial <= CACHE / 2:
        partial = 0
    flops = tokens * seen * spec.pair_flops
    return Traffic(queries + keys + partial, queries + keys, flops)


def candidates(spec: AttentionSpec, target: Target) -> Iterator[Config]:
    """Tilings that fit, the most promising first.

    Memory bounds these kernels: a tile's rows should be the heads that share keys, not more, and
    enough of the history should be on its way. Two loads of shared memory per product are the
    second cost, which fewer and longer tiles of the history make no smaller.
    """
    ops = Operands(spec)
    loaded = sum(tile.chunk.width for tile in ops.loads)
    values = sum(tile.chunk.width for tile in ops.values)
    narrow = min(tile.chunk.width for tile in ops.loads)
    rows = max(16, min(64, 1 << (spec.group - 1).bit_length()))
    found = []
    for block_m in {rows, max(16, rows // 2)}:
        for block_n in (16, 32, 64, 128):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    threads = warps * target.warp
                    if block_m < 64 and narrow < 32 and block_n > 64:
                        continue  # a narrow tile's columns are few for so many rows: it spills
                    if spec.dtype == "float32" and (block_m > 32 or block_m * block_n > WIDE):
                        continue
                    config = Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages)
                    shared = shared_bytes(spec, target, config)
                    registers = (block_m * values + 1.5 * block_m * block_n) / threads + 60
                    # Below a warp group's 64 rows, operands of products lie in registers too.
                    most = 216 if block_m >= 64 else 160
                    if shared > 0.98 * target.shared or registers > most:
                        continue
                    flying = min((stages - 1) * block_n * loaded * spec.width, 48 << 10)
                    again = -(-spec.group // block_m)
                    cost = again * (1 + 16 / block_n) / flying
                    cost *= 1 + 0.1 * (warps == 8) * (block_m * values < 64 * 512)
                    found.append((cost, shared, config))
    if not found:
        yield Config({"BLOCK_M": 16, "BLOCK_N": 16}, 8, 1)
    yield from (config for *_, config in sorted(found, key=lambda one: one[:2]))


def _source(spec: AttentionSpec, ops: Operands, name: str, arguments: tuple[Argument, ...]) -> str:
    parameters = ", ".join(argument.name for argument in arguments)
    lines = [
        *_range(spec),
        "",
        *ops.columns(),
        *(line for query, _ in ops.scores for line in _query(query)),
        "n = tl.arange(0, BLOCK_N)",
        *state_lines(ops, "BLOCK_M"),
        *_sink(spec),
        # What does not change is computed anew: kept over the loop, it would cost registers that
        # sums and scores need.
        "for s in tl.range(begin, end, BLOCK_N, disable_licm=True):",
    ]
    body = ["inside = s + n < end"]
    if spec.packed:
        body.append("key_row = (keys_first + s + n).to(tl.int64)[:, None]")
    if spec.paged:
        body += page_lines(spec.page, "inside")
    conditions = ["inside[None, :]", *visible_text(spec, "gap")]
    body += [
        *(_load(spec, tile) for tile in ops.loads),
        *score_lines(spec, ops),
        *(["gap = position[:, None] - (s + n)[None, :]"] if len(conditions) > 1 else []),
        f'scores = tl.where({" & ".join(conditions)}, scores, float("-inf"))',
        *softmax_step(spec, ops),
    ]
    lines += [f"    {line}" for line in body]
    lines += [
        "",
        "share = 1.0 / tl.where(total == 0.0, 1.0, total)  # who sees nothing gives zeros",
        f"at = (row * tl.num_programs(1) + split) * {spec.heads} + head[:, None]",
        *(_store(spec, tile) for tile in ops.values),
        "if tl.num_programs(1) > 1:",
        f"    part_of = ((first + token).to(tl.int64) * tl.num_programs(1) + split) * {spec.heads}",
        "    tl.store(weight + part_of + head, peak + tl.log2(total), mask=asked)",
    ]
    return f'''\
@triton.jit
def {name}(
    {parameters},
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """{maths(spec)}, one split of the history.

    {spec.heads} heads of {spec.score_dim}/{spec.held.dim}, {spec.kv_heads} of keys and values; few
    queries of each sequence, which are the last positions of their histories.
    Tiling: a program owns BLOCK_M pairs of a query and one of the {spec.group} heads that share
    keys, and one of num_programs(1) equal parts of a history, BLOCK_N positions at a time.
    Of several parts it leaves the normalised sum and log2 of its weight, for the reduction; of one,
    the result.
    Bytes: {spec.token_bytes:,} a position, and {spec.query_bytes:,} a query and its result.
    FLOPs: {spec.pair_flops:,} a position and query, {_intensity(spec):.0f} a byte of the cache.
    Bound: {_bound(spec)}.
    """
{indented(lines, 1)}
'''


def _intensity(spec: AttentionSpec) -> float:
    return spec.pair_flops / spec.token_bytes


def _bound(spec: AttentionSpec) -> str:
    if _intensity(spec) < 100:
        return "memory, the cache read once"
    return "memory, the cache read once; near tensor cores' rate already for one query a sequence"


def _range(spec: AttentionSpec) -> list[str]:
    """Which rows and which part of the history this program has."""
    least, beyond = spec.visible or (None, None)
    group, kv_heads = spec.group, spec.kv_heads
    lines = [
        *(
            [f"kv_head = tl.program_id(0) % {kv_heads}", f"tile = tl.program_id(0) // {kv_heads}"]
            if kv_heads > 1
            else ["tile = tl.program_id(0)"]
        ),
        "split = tl.program_id(1)",
        "sequence = tl.program_id(2)",
        "first = tl.load(q_offsets + sequence)",
        "queries = tl.load(q_offsets + sequence + 1) - first",
        f"if tile * BLOCK_M >= queries * {group}:",
        "    return",
    ]
    if spec.packed:
        lines += [
            "keys_first = tl.load(k_offsets + sequence)",
            "history = tl.load(k_offsets + sequence + 1) - keys_first",
        ]
    else:
        lines.append("history = tl.load(lengths + sequence)")
    first_head = f"kv_head * {group} + " if kv_heads > 1 else ""
    lines += [
        f"if {group} % BLOCK_M == 0:  # the rows of a tile are heads of one query",
        f"    token = tl.zeros([BLOCK_M], tl.int32) + tile * BLOCK_M // {group}",
        f"    head = {first_head}tile * BLOCK_M % {group} + tl.arange(0, BLOCK_M)",
        "else:",
        "    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)",
        f"    token = pair // {group}",
        f"    head = {first_head}pair % {group}",
        "asked = token < queries",
        "start = history - queries  # the position of the sequence's first query",
        "position = start + token",
        "row = (first + token).to(tl.int64)[:, None]",
        "",
        "# The positions that any query of the sequence sees, and this split's part of them.",
        "high = history"
        if least is None
        else f"high = tl.maximum(history - {least}, 0)"
        if least > 0
        else "high = history",
        "low = 0"
        if beyond is None
        else f"low = tl.minimum(tl.maximum(start - {beyond - 1}, 0), high) // BLOCK_N * BLOCK_N",
        "part = tl.cdiv(tl.cdiv(high - low, tl.num_programs(1)), BLOCK_N) * BLOCK_N",
        "begin = low + split * part",
        "end = tl.minimum(begin + part, high)",
    ]
    return lines


def _sink(spec: AttentionSpec) -> list[str]:
    """Of several parts of a history, the first has the sink."""
    if not spec.sink:
        return []
    return [
        "if split == 0:",
        f"    peak = tl.load(sink + head, mask=asked, other=0.0).to(tl.float32) * {LOG2_E!r}",
        "    total = total + 1.0",
    ]


def _query(tile: Tile) -> list[str]:
    rows = tile.rows
    at = f"row * {rows.token} + head[:, None] * {rows.head} + {column(tile)}"
    return [f"{tile.name} = tl.load({tile.tensor} + {at}, mask={within(tile, 'asked')}, other=0.0)"]


def _load(spec: AttentionSpec, tile: Tile) -> str:
    row = "cache_row" if tile.rows.paged else "key_row"
    offset = head_offset(tile.rows, "kv_head", spec.kv_heads)
    at = f"{row} * {tile.rows.token}{offset} + {column(tile)}"
    return f"{tile.name} = tl.load({tile.tensor} + {at}, mask={within(tile, 'inside')}, other=0.0)"


def _store(spec: AttentionSpec, tile: Tile) -> str:
    result = f"({sums(tile)} * share[:, None]).to(out.dtype.element_ty)"
    at = f"at * {spec.held.dim} + {column(tile)}"
    return f"tl.store(out + {at}, {result}, mask={within(tile, 'asked')})"


def _reduction(spec: AttentionSpec, name: str) -> Kernel:
    dim = spec.held.dim
    arguments = (
        pointer("partial", spec.dtype),
        pointer("weight", "float32"),
        pointer("out", spec.dtype),
        size("splits"),
    )
    width = 1 << (dim - 1).bit_length()
    source = f'''\
@triton.jit
def {name}(partial, weight, out, splits, SPLITS: tl.constexpr):
    """out = sum_i 2^weight[i] partial[i] / sum_i 2^weight[i], over the splits of a history.

    One program for each query and head; at most SPLITS splits.
    Bytes: {dim * spec.width + 4:,} a split and {dim * spec.width:,} of the result.
    FLOPs: {2 * dim:,} a split. Bound: memory.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, SPLITS)
    at = (row * splits + i) * {spec.heads} + head
    log = tl.load(weight + at, mask=i < splits, other=float("-inf"))
    highest = tl.max(log, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)  # nothing was seen: zeros
    total = tl.sum(tl.exp2(log - shift), 0)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    d = tl.arange(0, {width})
    added = tl.zeros([{width}], tl.float32)
    for split in tl.range(0, splits):
        one = (row * splits + split) * {spec.heads} + head
        part = tl.exp2(tl.load(weight + one) - shift) * share
        added += part * tl.load(partial + one * {dim} + d, mask=d < {dim}, other=0.0)
    result = added.to(out.dtype.element_ty)
    tl.store(out + (row * {spec.heads} + head) * {dim} + d, result, mask=d < {dim})
'''
    warps = max(1, min(4, width // 128))
    return Kernel(name, source, arguments, (Config({"SPLITS": MOST_SPLITS}, warps),))


def _more(spec: AttentionSpec) -> list[str]:
    """The launcher's whole numbers."""
    return ["most_queries"] + ([] if spec.paged else ["most_positions"])


def _launcher(spec: AttentionSpec, name: str, arguments: tuple[Argument, ...], running: int) -> str:
    query = f"q_{spec.terms[0].name}"
    sequences = "k_offsets.numel() - 1" if spec.packed else "lengths.numel()"
    renamed = {"table_width": "page_table.stride(0)", "out": "partial if splits > 1 else out"}
    passed = ", ".join(renamed.get(a.name, a.name) for a in arguments)
    places = "k_offsets: int32 [sequences + 1]" if spec.packed else "lengths: int32 [sequences]"
    table = "; page_table: int32 [sequences, pages]" if spec.paged else ""
    heads, dim = spec.heads, spec.held.dim
    longest = f"page_table.shape[1] * {spec.page}" if spec.paged else "most_positions"
    return f'''\
def {name}({", ".join([*tensors(arguments), *_more(spec)])}, splits=None):
    """{maths(spec)} over packed queries, few of each sequence.

    q_offsets: int32 [sequences + 1], of the queries; {places}, of the histories{table}.
    most_queries: of any sequence; splits: parts of a history, at most {MOST_SPLITS}.
    Returns [queries, {heads}, {dim}].
    Nothing here depends on what tensors hold: a CUDA graph can be replayed as histories grow.
    """
    queries, device = {query}.shape[0], {query}.device
    out = torch.empty(queries, {heads}, {dim}, dtype={query}.dtype, device=device)
    if queries == 0:
        return out
    config = pick({name}_kernel_configs, queries)
    tiles = triton.cdiv(most_queries * {spec.group}, config["BLOCK_M"]) * {spec.kv_heads}
    sequences = {sequences}
    if splits is None:
        # Full waves of programs, {running} at once on each processor, against moving partial sums.
        longest, programs, processors = {longest}, tiles * sequences, {PROCESSORS}
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        processors *= {running}
        most = max(1, min({MOST_SPLITS}, longest // {SHORTEST_SPLIT}))

        def time(count):
            waves = triton.cdiv(programs * count, processors) * processors / (programs * count)
            return waves + (count * {_partial_share(spec):.6g} / longest if count > 1 else 0)

        splits = min(range(1, most + 1), key=time)
    parts = splits if splits > 1 else 0
    partial = torch.empty(queries * parts, {heads}, {dim}, dtype={query}.dtype, device=device)
    weight = torch.empty(queries * parts, {heads}, dtype=torch.float32, device=device)
    {name}_kernel[(tiles, splits, sequences)]({passed}, **config)
    if splits > 1:
        config = pick({name}_reduction_configs, queries)
        {name}_reduction[(queries, {heads}, 1)](partial, weight, out, splits, **config)
    return out
'''
