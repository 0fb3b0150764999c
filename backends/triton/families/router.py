"""Routing: from an expert's logits to the experts that a token goes to, and their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from backends.triton.families.attention import indented
from backends.triton.families.ordering import LOWEST, ORDERED
from backends.triton.kernel import Config, Kernel, Operator, Traffic, pointer, size
from backends.triton.targets import Target

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}


@dataclass(frozen=True)
class RouterSpec:
    """How a token's experts are chosen and weighed.

    Attributes:
        score: ``sigmoid`` of each logit, or ``softmax`` over all.
        biased: a bias is added to the scores that choose; it never weighs.
        groups: experts lie in so many groups of equal size, of which ``open_groups`` may be used:
            those whose ``best`` best experts have the greatest sum.
        closed: what stands for the scores of the other groups when experts are chosen.
        weigh_closed: the weight of an expert of a closed group is ``closed``, not its score.
        normalise: weights are divided by their sum plus ``eps``.
        scale: what weights are multiplied by.
        dtype: of the logits. Scores and weights are float32.
        index: dtype of the picks.
    """

    experts: int
    picks: int
    score: str = "sigmoid"
    biased: bool = False
    groups: int = 1
    open_groups: int = 1
    best: int = 1
    closed: float = float("-inf")
    weigh_closed: bool = False
    normalise: bool = False
    eps: float = 0.0
    scale: float = 1.0
    dtype: str = "float32"
    index: str = "int64"

    def __post_init__(self) -> None:
        if self.score not in ("sigmoid", "softmax"):
            raise ValueError(f"no score is called {self.score}")
        if self.experts % self.groups or not 1 <= self.best <= self.experts // self.groups:
            raise ValueError(f"{self.experts} experts in {self.groups} groups, best {self.best}")
        if not (1 <= self.picks <= self.experts and 1 <= self.open_groups <= self.groups):
            raise ValueError(f"{self.picks} of {self.experts} experts, {self.open_groups} groups")

    @property
    def limited(self) -> bool:
        return self.open_groups < self.groups

    @property
    def members(self) -> int:
        """Experts of a group; all, where groups do not matter."""
        return self.experts // self.groups if self.limited else self.experts

    @property
    def name(self) -> str:
        parts = [f"router_{self.score}_{self.picks}of{self.experts}"]
        parts += [f"groups{self.open_groups}of{self.groups}best{self.best}"] if self.limited else []
        parts += ["bias"] if self.biased else []
        parts += ["closed0"] if self.limited and self.closed == 0 else []
        parts += ["normalised"] if self.normalise else []
        parts += [f"x{self.scale:g}".replace(".", "p")] if self.scale != 1 else []
        parts += [self.dtype] if self.dtype != "float32" else []
        return "_".join(parts)


def generate(spec: RouterSpec, target: Target) -> Operator:
    """The operator ``name(logits[, bias]) -> (pick, weight)``."""
    name = f"{spec.name}_kernel"
    arguments = (
        pointer("logits", spec.dtype),
        *([pointer("bias", "float32")] if spec.biased else []),
        pointer("pick", spec.index),
        pointer("weight", "float32"),
        size("tokens"),
    )
    ordered = tuple(candidates(spec, target))
    source = _source(spec, name, ", ".join(a.name for a in arguments))
    kernel = Kernel(
        name, source, arguments, ordered[:1], ordered[1:], helpers=(("ordered", ORDERED),)
    )
    return Operator(
        name=spec.name,
        kernels=(kernel,),
        launcher=_launcher(spec),
        traffic=lambda sizes: traffic(spec, sizes),
        shown={"tokens": 4096},
        example=lambda sizes, device: _example(spec, sizes["tokens"], device),
    )


def traffic(spec: RouterSpec, sizes: Mapping[str, int]) -> Traffic:
    """What a call moves: each logit once, each choice once."""
    tokens = sizes["tokens"]
    moved = tokens * (
        spec.experts * BYTES[spec.dtype] + spec.picks * (4 + BYTES[spec.index])
    ) + spec.experts * 4 * int(spec.biased)
    rounds = spec.picks + (spec.best + 1 if spec.limited else 0)
    return Traffic(moved, moved, tokens * spec.experts * (8 + 2 * rounds))


def _example(spec: RouterSpec, tokens: int, device: str) -> tuple[Any, ...]:
    import torch

    logits = torch.randn(tokens, spec.experts, dtype=getattr(torch, spec.dtype), device=device)
    bias = torch.randn(spec.experts, device=device) / 10
    return (logits, bias) if spec.biased else (logits,)


def candidates(spec: RouterSpec, target: Target) -> Iterator[Config]:
    """Tokens of a program: so many that a thread has 8 experts or so, which leaves the reductions
    of a token within one warp or two."""
    width = _power(spec.experts // spec.members) * _power(spec.members)
    found = [
        Config({"BLOCK_T": block}, warps) for block in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8)
    ]
    yield from sorted(found, key=lambda c: (abs(_each(c, width, target) - 8), abs(c.num_warps - 4)))


def _each(config: Config, width: int, target: Target) -> float:
    return config.constants["BLOCK_T"] * width / (config.num_warps * target.warp)


def _power(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _source(spec: RouterSpec, name: str, parameters: str) -> str:
    groups = spec.experts // spec.members
    moved = spec.experts * BYTES[spec.dtype] + spec.picks * (4 + BYTES[spec.index])
    lines = [
        "t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)",
        f"g = tl.arange(0, {_power(groups)})[None, :, None]",
        f"m = tl.arange(0, {_power(spec.members)})[None, None, :]",
        f"expert = g * {spec.members} + m",
        f"exists = (g < {groups}) & (m < {spec.members})",
        "asked = t < tokens",
        "row = t.to(tl.int64)[:, None, None]",
        "inside = asked[:, None, None] & exists",
        f"logit = tl.load(logits + row * {spec.experts} + expert, mask=inside, other=0.0)",
        *_scores(spec),
    ]
    worth = "score"
    if spec.biased:
        lines.append("chooses = score + tl.load(bias + expert, mask=exists, other=0.0)")
        worth = "chooses"
    if spec.limited:
        lines += _open_groups(spec, groups, worth)
        worth = "allowed"
    weighs = "allowed" if spec.limited and spec.weigh_closed else "score"
    lines += [
        "",
        f"k = tl.arange(0, {_power(spec.picks)})[None, :]",
        f"picks = tl.zeros([BLOCK_T, {_power(spec.picks)}], tl.int32)",
        f"weights = tl.zeros([BLOCK_T, {_power(spec.picks)}], tl.float32)",
        f"keys = tl.where(exists, ordered({worth}, expert), {LOWEST})",
        f"for i in tl.static_range({spec.picks}):",
        "    first = tl.max(tl.max(keys, 2), 1)[:, None, None]",
        "    taken = keys == first",
        "    place = tl.sum(tl.sum(tl.where(taken, expert, 0), 2), 1)",
        f"    value = tl.sum(tl.sum(tl.where(taken, {weighs}, 0.0), 2), 1)",
        "    picks = tl.where(k == i, place[:, None], picks)",
        "    weights = tl.where(k == i, value[:, None], weights)",
        f"    keys = tl.where(taken, {LOWEST}, keys)",
    ]
    if spec.normalise:
        eps = f" + {spec.eps!r}" if spec.eps else ""
        lines.append(f"weights = weights / (tl.sum(weights, 1){eps})[:, None]")
    if spec.scale != 1:
        lines.append(f"weights *= {spec.scale!r}")
    lines += [
        f"at = t.to(tl.int64)[:, None] * {spec.picks} + k",
        f"valid = asked[:, None] & (k < {spec.picks})",
        "tl.store(pick + at, picks.to(pick.dtype.element_ty), mask=valid)",
        "tl.store(weight + at, weights, mask=valid)",
    ]
    return f'''\
@triton.jit
def {name}({parameters}, BLOCK_T: tl.constexpr):
    """The {spec.picks} of {spec.experts} experts that a token goes to, the best first, and weights.

    {_maths(spec)}
    Tiling: a program owns BLOCK_T tokens; their scores, [BLOCK_T, {groups} groups,
    {spec.members} experts], stay in registers. Ties go to the lowest expert; NaN before all.
    Bytes: {moved:,} a token, each once. FLOPs: a few hundred for each score. Bound: memory.
    """
{indented(lines, 1)}
'''


def _maths(spec: RouterSpec) -> str:
    chooses = "score + bias" if spec.biased else "score"
    said = f"score = {spec.score}(logits); chosen by {chooses}"
    if spec.limited:
        said += f", in the {spec.open_groups} groups with the best sum of {spec.best}"
    weight = "score / sum(score)" if spec.normalise else "score"
    return f"{said};\n    weight = {weight}{f' * {spec.scale:g}' if spec.scale != 1 else ''}."


def _scores(spec: RouterSpec) -> list[str]:
    if spec.score == "sigmoid":
        return ["score = 1.0 / (1.0 + tl.exp(-logit.to(tl.float32)))"]
    return [
        'logit = tl.where(exists, logit.to(tl.float32), float("-inf"))',
        "highest = tl.max(tl.max(logit, 2), 1)",
        'highest = tl.where(highest == float("-inf"), 0.0, highest)[:, None, None]',
        "raised = tl.exp(logit - highest)",
        "total = tl.sum(tl.sum(raised, 2), 1)",
        "score = raised / tl.where(total == 0.0, 1.0, total)[:, None, None]",
    ]


def _open_groups(spec: RouterSpec, groups: int, worth: str) -> list[str]:
    """Which groups may be used: by the sum of their best experts."""
    lines = ["", f"# What a group is worth: the sum of its {spec.best} best experts."]
    if spec.best == 1:
        lines += [
            f'worth = tl.max(tl.where(exists, {worth}, float("-inf")), 2)',
        ]
    else:
        lines += [
            f"keys = tl.where(exists, ordered({worth}, expert), {LOWEST})",
            f"worth = tl.zeros([BLOCK_T, {_power(groups)}], tl.float32)",
            f"for _ in tl.static_range({spec.best}):",
            "    taken = keys == tl.max(keys, 2)[:, :, None]",
            f"    worth += tl.sum(tl.where(taken & exists, {worth}, 0.0), 2)",
            f"    keys = tl.where(taken, {LOWEST}, keys)",
        ]
    closed = f'float("{spec.closed}")' if spec.closed in (float("-inf"),) else repr(spec.closed)
    return [
        *lines,
        f"group = tl.arange(0, {_power(groups)})[None, :]",
        f"keys_of_groups = tl.where(group < {groups}, ordered(worth, group), {LOWEST})",
        f"is_open = tl.zeros([BLOCK_T, {_power(groups)}], tl.int32)",
        f"for _ in tl.static_range({spec.open_groups}):",
        "    best = keys_of_groups == tl.max(keys_of_groups, 1)[:, None]",
        '    is_open = tl.where(best & (worth > float("-inf")), 1, is_open)',
        f"    keys_of_groups = tl.where(best, {LOWEST}, keys_of_groups)",
        f"allowed = tl.where(is_open[:, :, None] > 0, {worth}, {closed})",
    ]


def _launcher(spec: RouterSpec) -> str:
    bias = ", bias" if spec.biased else ""
    about = f"; bias: f32 [{spec.experts}]" if spec.biased else ""
    return f'''\
def {spec.name}(logits{bias}):
    """The experts of each token and their weights, both [tokens, {spec.picks}].

    logits: [tokens, {spec.experts}]{about}. Experts are {spec.index}, weights f32.
    """
    tokens = logits.shape[0]
    pick_of = torch.empty(tokens, {spec.picks}, dtype=torch.{spec.index}, device=logits.device)
    weight = torch.empty(tokens, {spec.picks}, dtype=torch.float32, device=logits.device)
    if tokens:
        config = pick({spec.name}_kernel_configs, tokens)
        grid = (triton.cdiv(tokens, config["BLOCK_T"]), 1, 1)
        {spec.name}_kernel[grid](logits{bias}, pick_of, weight, tokens, **config)
    return pick_of, weight
'''
