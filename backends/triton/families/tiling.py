"""How products are tiled: candidates, ordered by an analytic model of the machine.

The model decides which candidate is used before anything is measured, and in which order tuning
tries them. It counts rounds of programs, tensor core time, and what comes through the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from backends.triton.kernel import Config, Kernel
from backends.triton.targets import Target

RESIDENT = 100e3  # bytes of tiles of a program, so that a processor holds two
MOST_MOVED = 1.15  # bytes of what has to be moved, partial sums included


@dataclass(frozen=True)
class Machine:
    """What the model knows of a GPU: from its maker's data sheet.

    Attributes:
        processors: streaming multiprocessors, or compute units.
        rates: FLOP/s of dense products, by bytes of an element.
        memory, cache: bytes/s of device memory, and from the L2 cache to the processors.
        kept: bytes that stay in the L2 cache while others stream through it: half of it.
        fill: seconds until a program's first tile has come from memory and its last is stored.
    """

    processors: int
    rates: Mapping[int, float]
    memory: float
    cache: float
    kept: float
    fill: float = 1.5e-6


MACHINES = {
    "sm_80": Machine(108, {2: 312e12}, 2.04e12, 4e12, 20e6),
    "sm_89": Machine(128, {2: 165e12, 1: 330e12}, 1.01e12, 4e12, 36e6),
    "sm_90": Machine(132, {2: 989e12, 1: 1979e12}, 3.35e12, 5.5e12, 25e6),
    "sm_100": Machine(148, {2: 2250e12, 1: 4500e12}, 8e12, 12e12, 60e6),
    "gfx942": Machine(304, {2: 1307e12}, 5.3e12, 10e12, 16e6),
}


@dataclass(frozen=True)
class Shape:
    """A product, or several that run as one: sizes, and bytes of an element of each operand."""

    m: int
    n: int
    k: int
    a_bytes: float
    w_bytes: float
    out_bytes: float
    groups: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    @property
    def compulsory(self) -> float:
        """Each operand read once, the result written once."""
        a, w = self.m * self.k * self.a_bytes, self.groups * self.n * self.k * self.w_bytes
        return a + w + self.m * self.n * self.out_bytes

    @property
    def rate_of(self) -> int:
        """Bytes of the elements that tensor cores multiply: the wider operand's."""
        return max(1, round(max(self.a_bytes, self.w_bytes)))


def meanwhile(shape: Shape, machine: Machine) -> float:
    """Bytes that memory could move while tensor cores are at work on the product."""
    return shape.flops / machine.rates[shape.rate_of] * machine.memory


def wide_bytes(shape: Shape, constants: Mapping[str, int], machine: Machine) -> float:
    """Bytes from memory and to it when tiles are taken GROUP down, then across."""
    block_m, block_n = constants["BLOCK_M"], constants["BLOCK_N"] * constants.get("HALVES", 1)
    m = ceil(shape.m / shape.groups)  # of each group, if they are even
    down, across = ceil(m / block_m), ceil(shape.n / block_n)
    high = min(constants["GROUP"], down)
    a, w = m * shape.k * shape.a_bytes, shape.n * shape.k * shape.w_bytes
    at_once = max(1.0, constants["PROGRAMS"] / high)
    strip = high * block_m * shape.k * shape.a_bytes
    a_reads = 1.0 if strip <= machine.kept else max(1.0, across / at_once)
    w_reads = 1.0 if w <= machine.kept else float(ceil(down / high))
    return shape.groups * (a * a_reads + w * w_reads) + shape.m * shape.n * shape.out_bytes


def wide_seconds(
    shape: Shape, config: Config, machine: Machine, per_processor: int, scaled: bool
) -> float:
    """Modelled time of a persistent kernel with these tiles."""
    given = config.constants
    block_m, block_n = given["BLOCK_M"], given["BLOCK_N"] * given.get("HALVES", 1)
    m = ceil(shape.m / shape.groups)
    tiles = shape.groups * ceil(m / block_m) * ceil(shape.n / block_n)
    rounds = ceil(tiles / (machine.processors * per_processor))
    # Warpgroups multiply 64 rows at once, whatever the tile has.
    products = 2.0 * max(block_m, 64) * block_n * shape.k
    multiply = per_processor * products * machine.processors / machine.rates[shape.rate_of]
    if scaled:  # float32 additions: as a share of a clock's products, half of them hidden
        multiply *= 1.0 + 16.0 / block_m
    come = block_m * shape.a_bytes + block_n * shape.w_bytes
    fetch = per_processor * come * shape.k * machine.processors / machine.cache
    fill = machine.fill / per_processor
    moved = wide_bytes(shape, given, machine) / machine.memory
    return max(rounds * (max(multiply, fetch) + fill), moved)


def thin_seconds(shape: Shape, config: Config, machine: Machine) -> float:
    """Modelled time of a kernel that reads weights once for a few rows."""
    given = config.constants
    block_m, block_n, split = given["BLOCK_M"], given["BLOCK_N"], given.get("SPLIT", 1)
    m = ceil(shape.m / shape.groups)
    programs = shape.groups * ceil(shape.n / block_n) * ceil(m / block_m) * split
    k = ceil(shape.k / split)
    # A processor takes several programs at once: together they have its share of the cache's bytes
    # and of the tensor cores.
    each = ceil(programs / machine.processors)
    fetch = k * (block_n * shape.w_bytes + block_m * shape.a_bytes) / machine.cache
    multiply = 2.0 * k * block_n * block_m / machine.rates[shape.rate_of]
    moved = thin_bytes(shape, given, machine) / machine.memory
    busy = each * machine.processors * max(fetch, multiply)
    return max(busy, moved) + machine.fill + (machine.fill if split > 1 else 0.0)


def thin_bytes(shape: Shape, constants: Mapping[str, int], machine: Machine) -> float:
    """Bytes from memory and to it.

    Programs that share weights run side by side: those are read once. Partial sums are read right
    after they are written, from the cache.
    """
    split = constants.get("SPLIT", 1)
    partial = 4.0 * shape.m * shape.n * split if split > 1 else 0.0
    a = shape.m * shape.k * shape.a_bytes
    down = ceil(shape.m / constants["BLOCK_M"])
    across = ceil(shape.n / constants["BLOCK_N"])
    again = 0.0
    if shape.groups == 1 and a > machine.kept:
        again = a * (max(1.0, across * down / machine.processors) - 1.0)
    return shape.compulsory + partial + again


# BLOCK_M, BLOCK_N, HALVES, warps, stages, programs that a processor holds.
Way = tuple[int, int, int, int, int, int]
SCALED: Mapping[str, Sequence[Way]] = {
    "sm_90": (
        (128, 128, 2, 8, 4, 1),
        (128, 128, 2, 8, 3, 1),
        (128, 128, 1, 8, 4, 1),
        (64, 128, 1, 4, 4, 2),
        (64, 64, 1, 4, 4, 3),
    ),
    "sm_100": (
        (128, 128, 1, 8, 4, 1),
        (128, 128, 1, 8, 3, 1),
        (64, 128, 1, 4, 3, 2),
        (64, 64, 1, 4, 4, 3),
    ),
    "sm_89": ((64, 64, 1, 4, 3, 1), (64, 128, 1, 8, 2, 1)),
}
PLAIN: Mapping[str, Sequence[Way]] = {
    "sm_90": (
        (128, 256, 1, 8, 3, 1),
        (128, 256, 1, 8, 4, 1),
        (128, 128, 1, 8, 4, 1),
        (64, 256, 1, 8, 4, 1),
        (64, 128, 1, 4, 4, 2),
        (64, 64, 1, 4, 4, 3),
    ),
    "sm_100": (
        (128, 256, 1, 8, 3, 1),
        (128, 128, 1, 8, 4, 1),
        (64, 128, 1, 4, 4, 2),
        (64, 64, 1, 4, 4, 3),
    ),
    "sm_89": ((128, 128, 1, 8, 3, 1), (64, 64, 1, 4, 4, 2)),
    "sm_80": ((128, 128, 1, 8, 4, 1), (64, 64, 1, 4, 4, 2)),
    "gfx942": ((128, 128, 1, 4, 2, 1), (64, 64, 1, 4, 2, 2)),
}


def wide_configs(
    shape_of: Callable[[int], Shape],
    target: Target,
    scaled: bool,
    halves: bool,
    widest: int,
    counts: Sequence[int | None],
    many: int = 4096,
) -> tuple[tuple[Config, ...], tuple[Config, ...]]:
    """What is used for so many rows, and all candidates, the modelled best of many rows first.

    Args:
        shape_of: the product for so many rows.
        scaled: products go to float32 sums at each tile of K; halves: in two halves of a tile.
        widest: columns of a tile at most.
        counts: rows up to which a configuration is chosen; the last is None.
        many: rows that stand for more than the last count.
    """
    machine = MACHINES[target.name]
    found: list[tuple[Config, int]] = []
    for block_m, block_n, side, warps, stages, programs in (SCALED if scaled else PLAIN)[
        target.name
    ]:
        if block_n * side > max(64, widest) or side > 1 + halves:
            continue
        given = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP": 8}
        if halves:
            given["HALVES"] = side
        given["PROGRAMS"] = machine.processors * programs
        found.append((Config(given, warps, stages), programs))

    def ordered(rows: int) -> list[Config]:
        shape = shape_of(rows)
        timed = [(wide_seconds(shape, c, machine, p, scaled), i) for i, (c, p) in enumerate(found)]
        return [found[i][0] for _, i in sorted(timed)]

    best = [ordered(many if upto is None else upto)[0] for upto in counts]
    return joined(best, counts), tuple(ordered(many))


def joined(best: Sequence[Config], counts: Sequence[int | None]) -> tuple[Config, ...]:
    """Configurations with their counts, neighbours that are equal taken together."""
    out: list[Config] = []
    for config, upto in zip(best, counts, strict=True):
        used = Config(config.constants, config.num_warps, config.num_stages, upto)
        if out and out[-1].constants == used.constants and out[-1].num_warps == used.num_warps:
            out.pop()
        out.append(used)
    return tuple(out)


def thin_configs(
    shape_of: Callable[[int], Shape],
    target: Target,
    block_k: int,
    k_tiles: int,
    narrowest: int,
    counts: Sequence[int | None],
    split: bool,
    most: int = 64,
    tallest: int = 128,
) -> tuple[tuple[Config, ...], tuple[Config, ...]]:
    """As ``wide_configs``, for kernels that take few rows and read weights at full speed.

    Weights are the tensor cores' 64 rows, tokens their columns: 16, 32, 64, 128.

    Args:
        narrowest: weight rows of a tile at most.
        split: K may be split over programs.
        most: rows that stand for more than the last count.
        tallest: tokens of a tile at most: each scale of theirs is in a register of every thread.
    """
    machine = MACHINES[target.name]
    best, tried = [], []
    for upto in counts:
        shape = shape_of(most if upto is None else upto)
        each = ceil(shape.m / shape.groups)
        block_m = max(16, min(tallest, 1 << (each - 1).bit_length()))
        ways: list[tuple[float, int, Config]] = []
        for block_n in (64, 128):
            for parts in (1, 2, 4, 8, 16) if split else (1,):
                if block_n > max(64, narrowest) or parts * 2 > max(2, k_tiles):
                    continue
                warps = 4 if block_n == 64 or block_m <= 32 else 8
                stage = block_k * (block_n * shape.w_bytes + block_m * shape.a_bytes)
                stages = int(min(RESIDENT, target.shared) / stage)
                stages = max(2, min(8, k_tiles, stages))
                given = {"BLOCK_M": block_m, "BLOCK_N": block_n}
                if split:
                    given["SPLIT"] = parts
                else:  # as many programs as are at work at once: each takes its share of tiles
                    together = max(1, min(4, int(target.shared / (stages * stage))))
                    given |= {"GROUP": 8, "PROGRAMS": together * machine.processors}
                config = Config(given, warps, stages)
                if thin_bytes(shape, given, machine) > MOST_MOVED * shape.compulsory and parts > 1:
                    continue
                ways.append((thin_seconds(shape, config, machine), len(ways), config))
        ways.sort()
        best.append(ways[0][2])
        tried += [config for _, _, config in ways if config not in tried]
    return joined(best, counts), tuple(tried)


def configured(kernel: Kernel, rows: int) -> Config:
    """What is used for so many rows."""
    return next(c for c in kernel.configs if c.upto is None or rows <= c.upto)
