"""One whole layer of published size, quantised, beside torch.compile of the emitted PyTorch."""

from __future__ import annotations

import gc
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

from dslc.bench.gpu.machine import Machine, Roof
from dslc.bench.gpu.record import Record, digest_of
from dslc.bench.gpu.rivals import COMPILED
from dslc.bench.gpu.timing import difference, said

if TYPE_CHECKING:
    from torch import Tensor

    from backends.pytorch.model import Model
    from dslc.program import Program

AIM = 2.0  # times as fast as torch.compile of the emitted PyTorch in BF16
NEAR = (
    0.5  # in 2-norms: FP8 sends tokens of random weights elsewhere; unrelated results are 1.4 off
)
RIVAL = f"{COMPILED} of the emitted PyTorch, BF16"

# The layer that most of the published model is made of, with a table of inputs in front. Its file
# is written where it is compiled.
SOURCE = """edition 2026

import std.formats
import std.norm
import std.mla
import std.moe

index t : time

const hidden = config hidden_size
const vocab  = 256

block Layer[d] {
  use attn_norm = RMSNorm[d]
  use attn      = MLA[d]
  use mlp_norm  = RMSNorm[d]
  use mlp       = MoE[d]

  def (x[t,d]) -> y[t,d] {
    h[t,d] = x[t,d] + attn(attn_norm(x[t,d]))
    y[t,d] = h[t,d] + mlp(mlp_norm(h[t,d]))
  }
}

model One {
  index d : hidden, w : vocab
  param embed[w, d]
  use layer = Layer[d]

  def main(token[t] of w) -> y[t,d] {
    y[t,d] = layer(embed[token[t], d])
  }
}

dims published default {
  hidden = 7168
  heads = 128, q_rank = 1536, kv_rank = 512, nope = 128, rope = 64, value = 128
  experts = 256, groups = 8, open_groups = 4, per_token = 8, expert_ffn = 2048, shared_experts = 1
  routed_scale = 2.5, normalise = true, norm_eps = 1e-6
  rope_kind = "yarn", rope_theta = 10000.0, rope_factor = 40.0
  trained_length = 4096, max_positions = 163840
  beta_fast = 32.0, beta_slow = 1.0, mscale = 1.0, mscale_all_dim = 1.0
}

dims tiny of published {
  hidden = 256, heads = 4, q_rank = 96, kv_rank = 64, nope = 32, rope = 16, value = 32
  experts = 16, groups = 4, open_groups = 2, per_token = 4, expert_ffn = 128
}

deploy fp8 of One {
  precision fp8(e4m3, activations = 1 x 128, weights = 128 x 128, promote = 128)
            for contractions with a parameter, except embed, centroid
}
"""


@dataclass(frozen=True)
class LayerCase:
    """A step of the layer.

    Attributes:
        tokens: of each sequence; history: positions of each, the step's included; 0: no cache.
    """

    sequences: int
    tokens: int
    history: int

    @property
    def name(self) -> str:
        if self.history:
            return f"MoE layer, decode {self.sequences} x {self.history:,}"
        return f"MoE layer, prefill {self.sequences * self.tokens:,} tokens"


PUBLISHED = (LayerCase(1, 4096, 0), LayerCase(64, 1, 4096), LayerCase(128, 1, 4096))
TINY = (LayerCase(1, 9, 0), LayerCase(2, 1, 70))


def time_layers(
    machine: Machine,
    record: Record,
    seconds: float,
    progress: Callable[[str], None],
    only: str = "",
    tiny: bool = False,
) -> int:
    """Time what the record lacks, for so long at most. Returns how many cases are left."""
    end = time.monotonic() + seconds
    wanted = [case for case in (TINY if tiny else PUBLISHED) if only in case.name]
    if not wanted:
        return 0
    ours = _program(machine, tiny, coded=machine.target.fp8)
    theirs = _program(machine, tiny, target="cpu")
    mark = digest_of(_text(ours), _text(theirs))
    cases = [case for case in wanted if not record.has(case.name, mark)]
    if not cases or time.monotonic() >= end:
        return len(cases)
    assert record.roof is not None
    roof = Roof(**record.roof)
    rows = {case.name: _cost(ours, case, roof) for case in cases}
    results: dict[str, Any] = {}
    progress("MoE layer: random weights")
    for case, make in _steps(ours, cases, machine.device, _ours):
        progress(case.name)
        row = rows[case.name]
        try:
            call = make()
            results[case.name] = call().float()
            row["seconds"] = machine.seconds([call])
        except Exception as error:  # a row that failed, not the end of the run
            row["failed"] = said(error)
    for case, make in _steps(theirs, cases, machine.device, _compiled):
        progress(f"{case.name}: {RIVAL}")
        row = rows[case.name]
        row["torch"], row["absent"] = {}, {}
        try:
            call = make()
            if case.name in results:
                row["difference"] = difference(results[case.name], call().float(), norm=True)
                row["differs"] = not row["difference"] <= NEAR
            row["torch"][RIVAL] = machine.seconds([call])
        except Exception as error:  # it may not fit beside what else is there
            row["absent"][RIVAL] = said(error)
    for name, row in rows.items():
        record.add(name, {"digest": mark, **row})
    return 0


def _program(machine: Machine, tiny: bool, coded: bool = False, target: str = "") -> Program:
    from dslc.program import compile_file

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layer.arch"
        file.write_text(SOURCE)
        return compile_file(
            str(file),
            "tiny" if tiny else "published",
            deploy="fp8" if coded else None,
            target=target or machine.target.name,
            dtype="bfloat16",
        )


def _text(program: Program) -> str:
    """What is run, without where its file stood."""
    kernels = program.generated.kernels if program.generated is not None else ""
    return re.sub(r"\S*layer\.arch", "layer.arch", program.code() + kernels)


Call = Callable[[], "Tensor"]
Make = Callable[["Model", LayerCase, "Tensor"], Call]


def _steps(
    program: Program, cases: list[LayerCase], device: str, make: Make
) -> Iterator[tuple[LayerCase, Callable[[], Call]]]:
    """Each case with what makes its call, on one set of random weights, which are given up behind
    the last."""
    import torch

    from backends.pytorch.load import load

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "layer"
        program.save(directory)
        model = load(directory, device=device, dtype="bfloat16", seed=0, note=lambda _: None)
    for case in cases:
        draw = torch.Generator().manual_seed(0)
        count = case.sequences * case.tokens
        tokens = torch.randint(0, 256, (count,), generator=draw, device="cpu").to(device)
        yield case, partial(make, model, case, tokens)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _ours(model: Model, case: LayerCase, tokens: Tensor) -> Call:
    """Prompts as a step of their own; decoding as it is captured when tokens are generated."""
    import torch

    from backends.pytorch.replay import Decoding

    if not case.history:
        return _stepped(model, case, tokens, getattr(model.module, "main"))  # noqa: B009
    cache = _filled(model, case)
    for slot in range(case.sequences):
        cache.claim(slot, case.history)
    decoding = Decoding(model, ref(cache), case.sequences)
    decoding.stage(tokens.tolist(), range(case.sequences))

    def call(held: Any = cache) -> Tensor:  # the cache lives as long as the call
        with torch.no_grad():
            return decoding.run()

    return call


def _compiled(model: Model, case: LayerCase, tokens: Tensor) -> Call:
    import torch

    torch._dynamo.reset()
    main = torch.compile(getattr(model.module, "main"), dynamic=False)  # noqa: B009
    return _stepped(model, case, tokens, main)


def _stepped(model: Model, case: LayerCase, tokens: Tensor, main: Callable[..., Tensor]) -> Call:
    """The same step again and again: it writes what it wrote before."""
    import torch

    from backends.pytorch.runtime import Step

    cache = _filled(model, case) if case.history else None
    step = Step([case.tokens] * case.sequences, device=tokens.device, cache=cache)

    def call() -> Tensor:
        with torch.no_grad():
            return main(step, tokens)

    return call


def _filled(model: Model, case: LayerCase) -> Any:
    """A cache that holds all but the step's token of each sequence; what it holds takes no time."""
    cache = model.new_cache(case.sequences, case.history)
    cache.commit(range(case.sequences), [case.history - 1] * case.sequences)
    return cache


def _cost(program: Program, case: LayerCase, roof: Roof) -> dict[str, Any]:
    """The weights that the tokens' experts have, once, and their products. The cache, and what
    attention computes on it, are left out: the roof is a little further off than it says."""
    parameters = program.report(max(1, case.history)).parameters
    count = case.sequences * case.tokens
    constants: Mapping[str, Any] = program.constants
    experts, picks = constants["experts"], constants["per_token"]
    each = 3 * constants["hidden"] * constants["expert_ffn"]
    met = experts * (1 - (1 - picks / experts) ** count)
    width = 1 if program.deployed_name else 2
    moved = float(width * (parameters - (experts - met) * each))
    flops = 2.0 * count * (parameters - (experts - picks) * each)
    dtype = "float8_e4m3fn" if program.deployed_name else "bfloat16"
    return {
        "kernel": "the whole layer",
        "sizes": asdict(case),
        "bytes": moved,
        "least_bytes": moved,
        "flops": flops,
        "roof_seconds": roof.seconds(moved, flops, dtype),
        "aim_speedup": AIM,
    }
