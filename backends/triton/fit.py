"""Kernels whose tiling the installed Triton makes too much of: the next one is taken instead.

What a tiling takes is known when it has been compiled, and differs between versions of Triton: one
that was chosen with one of them may spill registers, or want more shared memory than there is, with
another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from backends.triton import ahead
from backends.triton.ahead import Binary
from backends.triton.kernel import Config, Kernel, Operator
from backends.triton.targets import Target
from compiler.errors import UserError

TRIES = 8  # of other tilings, the most promising first
Made = Binary | UserError


@dataclass
class _Search:
    """The tilings of one kernel that are tried in the place of one that does not fit."""

    kernel: Kernel
    wanted: Config
    made: Made  # of the tiling that was wanted
    left: Iterator[Config] = field(init=False)
    best: Binary | None = field(init=False)

    def __post_init__(self) -> None:
        self.left = _others(self.kernel, self.wanted)
        self.best = self.made if _runs(self.made) else None


def fitting(
    wanted: Iterable[tuple[Kernel, Config]],
    target: Target,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Binary]:
    """Compile each kernel in each configuration, or in the next of its candidates that fits.

    Of one that spills in all that are tried, the one that spills least is taken.

    Raises:
        UserError: Triton is not installed; or no tiling of a kernel compiles, or fits into shared
            memory. The message names the kernel.
    """
    jobs = list(wanted)
    made = ahead.try_ahead(jobs, target, progress)
    searches = {
        i: _Search(*job, one)
        for i, (job, one) in enumerate(zip(jobs, made, strict=True))
        if problem(one, target) is not None
    }
    for _ in range(TRIES):
        trying = [(i, c) for i, s in searches.items() if (c := next(s.left, None)) is not None]
        tried = ahead.try_ahead([(jobs[i][0], c) for i, c in trying], target, progress)
        for (i, _), one in zip(trying, tried, strict=True):
            search = searches[i]
            if problem(one, target) is None:
                made[i] = _instead(one, search, target)
                del searches[i]
            elif _runs(one) and (search.best is None or one.spills < search.best.spills):
                search.best = one
    for i, search in searches.items():
        if search.best is None:
            if isinstance(search.made, UserError):
                raise search.made
            name, why = search.kernel.name, problem(search.made, target)
            raise UserError(f"no tiling of kernel {name} fits {target.name}: {why}")
        made[i] = _instead(search.best, search, target)
    return [one for one in made if isinstance(one, Binary)]


def problem(made: Made, target: Target) -> str | None:
    """Why a compiled kernel should not be used; None: it may."""
    if isinstance(made, UserError):
        return str(made)
    if made.shared > target.shared:
        return f"it takes {made.shared:,} bytes of shared memory, of {target.shared:,}"
    if made.spills:
        return f"{made.spills} of its instructions spill registers"
    return None


def adopted(operator: Operator, compiled: Iterable[Binary]) -> Operator:
    """The operator with the configurations that were compiled in the place of others."""
    swapped: Mapping[tuple[str, str], Config] = {
        (one.kernel.name, one.replaces.text()): one.config
        for one in compiled
        if one.replaces is not None
    }
    kernels = []
    for kernel in operator.kernels:
        configs = tuple(
            replace(swapped.get((kernel.name, c.text()), c), upto=c.upto) for c in kernel.configs
        )
        kernels.append(replace(kernel, configs=configs) if configs != kernel.configs else kernel)
    return replace(operator, kernels=tuple(kernels))


def _runs(made: Made) -> TypeGuard[Binary]:
    """It would run, if not as fast as it should."""
    return isinstance(made, Binary) and made.shared <= made.target.shared


def _others(kernel: Kernel, wanted: Config) -> Iterator[Config]:
    met = {wanted.text()}
    for config in kernel.candidates:
        if config.text() not in met and config.constants.keys() == wanted.constants.keys():
            met.add(config.text())
            yield replace(config, upto=wanted.upto)


def _instead(made: Made, search: _Search, target: Target) -> Binary:
    assert isinstance(made, Binary)
    why = problem(search.made, target)
    if made.config.text() == search.wanted.text():
        return replace(made, because=f"{why}, and all other tilings that were tried are worse")
    return replace(made, replaces=search.wanted, because=why or "")
