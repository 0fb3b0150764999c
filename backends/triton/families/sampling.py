"""The next token of each sequence from its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from backends.triton.families.ordering import ORDERED
from backends.triton.kernel import Config, Kernel, Operator, Traffic, pointer
from backends.triton.targets import Target

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NAN = 0x7FFFFFFF  # the order of NaN


@dataclass(frozen=True)
class SamplingSpec:
    """Tokens of ``[sequences, vocab]`` logits.

    Attributes:
        greedy: the likeliest token, the lowest of several; else drawn, by each sequence's own
            temperature (0 is greedy), top-p and min-p, with a number in [0, 1) that is given.
    """

    vocab: int
    greedy: bool = False
    dtype: str = "float32"

    @property
    def name(self) -> str:
        dtype = [] if self.dtype == "float32" else [self.dtype]
        return "_".join(["greedy" if self.greedy else "sample", str(self.vocab), *dtype])


def generate(spec: SamplingSpec, target: Target) -> Operator:
    """``name(logits[, temperature, top_p, min_p, uniform]) -> token``."""
    name = f"{spec.name}_kernel"
    given = [] if spec.greedy else ["temperature", "top_p", "min_p", "uniform"]
    arguments = (
        pointer("logits", spec.dtype),
        *(pointer(each, "float32") for each in given),
        pointer("token", "int64"),
    )
    ordered = tuple(candidates(spec, target))
    helpers = [("ordered", ORDERED)]
    if spec.greedy:
        source = _greedy(spec, name)
    else:
        source = _drawn(spec, name)
        helpers += [("unordered", UNORDERED), ("share_of", SHARE), ("mass", MASS)]
    kernel = Kernel(name, source, arguments, ordered[:1], ordered[1:], helpers=tuple(helpers))
    extra = "".join(f", {each}" for each in given)
    about = "; the rest: f32 [sequences]" if given else ""
    launcher = f'''\
def {spec.name}(logits{extra}):
    """int64 [sequences], -1 where logits are NaN. logits: [sequences, {spec.vocab}]{about}."""
    token = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.shape[0]:
        config = pick({name}_configs, logits.shape[0])
        {name}[(logits.shape[0], 1, 1)](logits{extra}, token, **config)
    return token
'''
    return Operator(
        name=spec.name,
        kernels=(kernel,),
        launcher=launcher,
        traffic=lambda sizes: traffic(spec, sizes),
        shown={"sequences": 128},
        example=lambda sizes, device: _example(spec, sizes["sequences"], device),
    )


def traffic(spec: SamplingSpec, sizes: Mapping[str, int]) -> Traffic:
    """What a call moves: logits once from memory; a row stays in L2 while it is searched."""
    row = spec.vocab * BYTES[spec.dtype]
    moved = sizes["sequences"] * (row + (8 if spec.greedy else 24))
    passes = 1 if spec.greedy else 2 * 32 + 6
    return Traffic(moved, moved, 6 * passes * sizes["sequences"] * spec.vocab)


def _example(spec: SamplingSpec, sequences: int, device: str) -> tuple[Any, ...]:
    import torch

    shape = (sequences, spec.vocab)
    logits = 3 * torch.randn(shape, dtype=getattr(torch, spec.dtype), device=device)
    given = [torch.full((sequences,), x, device=device) for x in (0.8, 0.95, 0.02)]
    return (logits,) if spec.greedy else (logits, *given, torch.rand(sequences, device=device))


def candidates(spec: SamplingSpec, target: Target) -> Iterator[Config]:
    """Numbers that a step looks at: long steps, since one program has a whole row."""
    least = max(16, 1 << (spec.vocab - 1).bit_length())
    found: dict[str, Config] = {}
    for block, warps in ((2048, 8), (4096, 16), (1024, 8), (1024, 4), (8192, 16), (4096, 8)):
        config = Config({"BLOCK": min(block, least)}, warps)
        found.setdefault(config.text(), config)
    yield from found.values()


def _greedy(spec: SamplingSpec, name: str) -> str:
    moved = spec.vocab * BYTES[spec.dtype]
    return f'''\
@triton.jit
def {name}(logits, token, BLOCK: tl.constexpr):
    """The likeliest token of a sequence, the lowest of several; -1 where a logit is NaN.

    Tiling: a program for each sequence walks over its row, BLOCK logits at a time, and keeps the
    greatest key (logit, then place) of each lane.
    Bytes: {moved:,} a sequence. FLOPs: {6 * spec.vocab:,}. Bound: memory, where sequences are many.
    """
    row = logits + tl.program_id(0).to(tl.int64) * {spec.vocab}
    best = tl.full([BLOCK], {-(1 << 63)}, tl.int64)
    for start in tl.range(0, {spec.vocab}, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(row + place, mask=place < {spec.vocab}, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.where(place < {spec.vocab}, ordered(x, place), {-(1 << 63)}))
    first = tl.max(best, 0)
    chosen = {NAN} - (first & {NAN})
    tl.store(token + tl.program_id(0), tl.where((first >> 32) == {NAN}, -1, chosen))
'''


UNORDERED = """\
@triton.jit
def unordered(key):
    \"\"\"The float32 whose order (the upper half of its key) this int64 is.\"\"\"
    order = key.to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
"""

SHARE = """\
@triton.jit
def share_of(x, highest, sharpness):
    \"\"\"How likely a logit is, as a share of the likeliest: 2^((x - highest) sharpness).\"\"\"
    return tl.where(x == highest, 1.0, tl.exp2((x - highest) * sharpness))
"""

MASS = """\
@triton.jit
def mass(row, vocab, least, highest, sharpness, BLOCK: tl.constexpr):
    \"\"\"Summed shares of logits of at least this order, and how many are of it exactly.\"\"\"
    total = tl.zeros([BLOCK], tl.float32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, vocab, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(row + place, mask=place < vocab, other=float("-inf")).to(tl.float32)
        order = ordered(x, place) >> 32
        counts = (place < vocab) & (order >= least)
        total += tl.where(counts, share_of(x, highest, sharpness), 0.0)
        equal += ((place < vocab) & (order == least)).to(tl.int32)
    return tl.sum(total, 0), tl.sum(equal, 0)
"""


def _drawn(spec: SamplingSpec, name: str) -> str:
    moved = spec.vocab * BYTES[spec.dtype]
    vocab = spec.vocab
    return f'''\
@triton.jit
def {name}(
    logits, temperature, top_p, min_p, uniform, token, BLOCK: tl.constexpr
):
    """A token of a sequence, drawn from softmax(logits / temperature); -1 where a logit is NaN.

    Tokens are ordered by logit, then place. Kept are the first whose probabilities reach top_p, and
    of them those at least min_p as likely as the first; the token is the first whose sum of kept
    probabilities passes uniform * their sum. Nothing is sorted: where a sum is passed is found by
    halving the range of float32 bits, at most 32 times, with a pass over the row each.
    Tiling: a program for each sequence, BLOCK logits at a time. Sums are float32.
    Bytes: {moved:,} a sequence from memory, about {70 * moved:,} from L2.
    FLOPs: 6 a logit and pass.
    Bound: L2's rate to one processor.
    """
    row = logits + tl.program_id(0).to(tl.int64) * {vocab}
    best = tl.full([BLOCK], {-(1 << 63)}, tl.int64)
    for start in tl.range(0, {vocab}, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(row + place, mask=place < {vocab}, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.where(place < {vocab}, ordered(x, place), {-(1 << 63)}))
    first = tl.max(best, 0)
    top = first >> 32  # the order of the greatest logit
    chosen = {NAN} - (first & {NAN})
    heat = tl.load(temperature + tl.program_id(0))
    if (top != {NAN}) & (heat > 0.0):
        highest = unordered(top)
        sharpness = 1.4426950408889634 / heat
        total, same = mass(row, {vocab}, {-(1 << 31)}, highest, sharpness, BLOCK)
        # Top-p: the order of the last logit that is kept, and how many equal ones are.
        nucleus = tl.load(top_p + tl.program_id(0))
        last = tl.full([], {-(1 << 31)}, tl.int64)
        kept = tl.full([], {vocab}, tl.int32)
        summed = total
        if nucleus < 1.0:
            low, high = last, top + 1
            while high - low > 1:
                middle = (low + high) >> 1
                reached, same = mass(row, {vocab}, middle, highest, sharpness, BLOCK)
                enough = reached >= nucleus * total
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            last = low
            above, same = mass(row, {vocab}, last + 1, highest, sharpness, BLOCK)
            sums, equal = mass(row, {vocab}, last, highest, sharpness, BLOCK)
            each = share_of(unordered(last), highest, sharpness)
            wanted = tl.ceil((nucleus * total - above) / tl.maximum(each, 1e-38))
            kept = tl.minimum(tl.maximum(wanted, 1.0), equal.to(tl.float32)).to(tl.int32)
            summed = above + kept.to(tl.float32) * each
        # Min-p: of all that are likely enough, or of those that top-p keeps.
        floor = tl.load(min_p + tl.program_id(0))
        if floor > 0.0:
            low, high = tl.full([], {-(1 << 31)}, tl.int64), top + 1
            while high - low > 1:
                middle = (low + high) >> 1
                likely = share_of(unordered(middle), highest, sharpness) < floor
                low = tl.where(likely, middle, low)
                high = tl.where(likely, high, middle)
            if high > last:
                summed, same = mass(row, {vocab}, high, highest, sharpness, BLOCK)
                last, kept = high, tl.full([], {vocab}, tl.int32)
        # The draw: the greatest order at which the sum passes it.
        drawn = tl.load(uniform + tl.program_id(0)) * summed
        low, high = last, top + 1
        while high - low > 1:
            middle = (low + high) >> 1
            reached, same = mass(row, {vocab}, middle, highest, sharpness, BLOCK)
            passed = reached > drawn
            low = tl.where(passed, middle, low)
            high = tl.where(passed, high, middle)
        above, same = mass(row, {vocab}, low + 1, highest, sharpness, BLOCK)
        sums, equal = mass(row, {vocab}, low, highest, sharpness, BLOCK)
        each = share_of(unordered(low), highest, sharpness)
        number = tl.floor((drawn - above) / tl.maximum(each, 1e-38))
        most = tl.minimum(equal, tl.where(low == last, kept, equal)).to(tl.float32) - 1.0
        number = tl.maximum(tl.minimum(number, most), 0.0).to(tl.int32)
        # The number-th of the tokens of that order.
        before = tl.full([], 0, tl.int32)
        for start in tl.range(0, {vocab}, BLOCK):
            place = start + tl.arange(0, BLOCK)
            x = tl.load(row + place, mask=place < {vocab}, other=0.0).to(tl.float32)
            mine = (place < {vocab}) & ((ordered(x, place) >> 32) == low)
            rank = before + tl.cumsum(mine.to(tl.int32), 0) - 1
            here = tl.max(tl.where(mine & (rank == number), place, -1), 0)
            chosen = tl.where(here >= 0, here.to(tl.int64), chosen)
            before += tl.sum(mine.to(tl.int32), 0)
    tl.store(token + tl.program_id(0), tl.where(top == {NAN}, -1, chosen))
'''
