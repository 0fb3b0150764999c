"""One model, computed in every way it can be: all must agree.

The interpreter on the elaborated graph is the reference. Against it stand the interpreter after
every pass (in float64, both sides of every branch) and the emitted ``model.py`` (in float32): whole
prompts, ragged batches, chunks on a cache, token by token, the last rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from backends.pytorch.runtime import Cache, Step
from compiler.equivalence import difference
from compiler.interpret import Branches, CacheState, Interpreter, random_weights
from compiler.ir import Program
from compiler.pipeline import STAGES, Compiled, compile_model
from tests.pytorch.running import Both, close

# Tokens of each sequence in each step that shares a cache: sequences sit out, start late, grow.
Schedule = Sequence[Sequence[int]]
SCHEDULES: tuple[Schedule, ...] = (
    ((4,),),
    ((1, 5, 2),),
    ((3, 0, 6), (2, 4, 0), (1, 1, 1), (0, 1, 0), (3, 1, 2)),
    ((1,), (1,), (2,)),
)


def compiled(folder: Path, text: str) -> Compiled:
    file = folder / "model.arch"
    file.write_text(text)
    return compile_model(str(file))


def stages(model: Compiled) -> Iterator[tuple[str, Program]]:
    """The programs after the passes that changed something."""
    last = None
    for name in STAGES:
        program = model.after(name)
        if last is None or program.bodies != last.bodies:
            yield name, program
        last = program


def passes_agree(model: Compiled, steps: Sequence[int] = (3, 2, 1, 1)) -> None:
    """The interpreter gives the same after every pass, however it is asked."""
    source = model.after("elaborate")
    weights = random_weights(source, 0, torch.float64)
    reference = Interpreter(source, weights, torch.float64)
    for name, program in stages(model):
        if program is source:
            continue
        found = Interpreter(program, weights, torch.float64)
        has_branch = any(n.op == "branch" for g in program.bodies.values() for n in g)
        sides: tuple[Branches, ...] = ("then", "otherwise") if has_branch else ("guard",)
        for entry in source.entries:
            given = inputs(source, entry, sum(steps), torch.float64)
            for side in sides:
                for cached in (False, True):
                    run_both(
                        f"{name}, {entry}, {side}, {'cached' if cached else 'whole'}",
                        (reference, found), entry, given, steps if cached else [sum(steps)], side,
                    )  # fmt: skip


def run_both(
    where: str,
    interpreters: tuple[Interpreter, Interpreter],
    entry: str,
    given: Mapping[str, Tensor],
    steps: Sequence[int],
    side: Branches,
) -> None:
    states, at = (CacheState(), CacheState()), 0
    for count in steps:
        part = {k: v[at : at + count] for k, v in given.items()}
        at += count
        for rows in (None, [count - 1]):
            before, after = (state.copy() for state in states)
            wanted = interpreters[0].run(entry, part, state=before, rows=rows)
            found = interpreters[1].run(entry, part, state=after, rows=rows, branches=side)
            error = difference(found, wanted)
            assert error <= 1e-9, f"{where}, {at - count} .. {at}: off by {error:.1e}"
            if rows is None:
                kept = before, after
        states = kept


def inputs(program: Program, entry: str, time: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random arguments of an entry, over ``time`` positions."""
    generator = torch.Generator().manual_seed(7)
    body = program.bodies[program.entries[entry].body]
    given = {}
    for node in body.inputs:
        shape = [d.size.at({**program.sizes, "time": time}) for d in node.type.dims]
        assert node.type.dims[0].kind == "time"
        if node.type.of is not None:
            value = torch.randint(program.size(node.type.of), shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator, dtype=dtype)
        given[node.attrs["name"]] = value
    return given


def emitted_agrees(
    model: Compiled, stage: str = STAGES[-1], schedules: Sequence[Schedule] = SCHEDULES
) -> None:
    """The emitted model gives what the interpreter gives of the source."""
    source = model.after("elaborate")
    both = Both(model.after(stage), source)
    for entry in source.entries:
        for schedule in schedules:
            check(both, entry, *schedule)
        check(both, entry, (2, 7, 1), cached=False)
        last_rows(both, entry)
        long_prompt(both, entry)


def check(both: Both, entry: str, *chunks: Sequence[int], cached: bool = True) -> None:
    """The emitted model is as near to the exact result as the interpreter in float32: random
    models may be ill-conditioned."""
    exact = Interpreter(
        both.interpreter.program, {k: v.double() for k, v in both.weights.items()}, torch.float64
    )
    states = [(CacheState(), CacheState()) for _ in chunks[0]]
    cache = Cache(len(chunks[0])) if cached else None
    for number, counts in enumerate(chunks):
        given = both.inputs(entry, counts, seed=number)
        with torch.no_grad():
            found = both.emitted(entry, Step(counts, cache=cache), given)
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for one, count, pair in zip(given, counts, states, strict=True):
            for interpreter, state, part in zip(
                (both.interpreter, exact), pair, parts, strict=True
            ):
                if count:
                    part.append(interpreter.run(entry, one, state=state))
        single, double = (torch.cat(part, both.time_axis(entry)) for part in parts)
        allowed = 1e-5 + 10 * difference(single, double)
        error = difference(found, double)
        assert error <= allowed, f"{entry}, step {number} of {chunks}: off by {error:.1e}"


def last_rows(both: Both, entry: str) -> None:
    """The last rows alone are those rows of the whole."""
    for counts, cache in (((3, 1, 4), None), ((2, 0, 3), Cache(3))):
        given = both.inputs(entry, counts)
        with torch.no_grad():
            whole = both.emitted(entry, Step(counts), given)
            step = Step(counts, cache=cache, last_only=True)
            if whole.shape[both.time_axis(entry)] == step.total:
                found = both.emitted(entry, step, given)
                assert step.rows is not None
                close(found, whole.index_select(both.time_axis(entry), step.rows), 1e-4)


def long_prompt(both: Both, entry: str) -> None:
    """More positions than a branch's guard allows for, at once and after a history."""
    limits = [
        n.attrs["when"][2] for g in both.program.bodies.values() for n in g if n.op == "branch"
    ]
    for limit in {n for n in limits if n <= 64}:
        check(both, entry, (limit + 1, limit))
        check(both, entry, (2, 1), (limit, limit + 2), (1, limit + 1))


def agree(folder: Path, text: str) -> Compiled:
    """Every way to compute a model's entries agrees with every other."""
    model = compiled(folder, text)
    passes_agree(model)
    for stage in dict.fromkeys((STAGES[0], STAGES[-1])):
        emitted_agrees(model, stage)
    return model
