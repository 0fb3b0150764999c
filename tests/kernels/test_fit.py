"""Tilings that the installed Triton makes too much of: the next one is taken, and said to be."""

from dataclasses import replace
from pathlib import Path

import pytest

from backends.triton import ahead, fit
from backends.triton.ahead import Binary
from backends.triton.families import gemm
from backends.triton.families.gemm_spec import Gemm
from backends.triton.generate import Generated, files
from backends.triton.kernel import Config, Kernel, size
from backends.triton.targets import SM_90
from compiler.errors import UserError
from dslc.gpu import show_kernels


def operator(stages: int):
    """A product whose first tiling has so many tiles on their way, and the usual one second."""
    made = gemm.generate(Gemm(512, 512), SM_90)
    few, *others = made.kernels
    usual = few.configs[-1]
    first = replace(usual, num_stages=stages)
    changed = replace(few, configs=(*few.configs[:-1], first), candidates=(usual,))
    return replace(made, kernels=(changed, *others)), changed, first, usual


def test_what_takes_too_much_shared_memory_gives_way(capsys) -> None:
    made, kernel, first, usual = operator(stages=20)
    (found,) = fit.fitting([(kernel, first)], SM_90)
    assert found.config.text() == usual.text() and found.replaces == first
    assert found.shared <= SM_90.shared
    assert found.because.endswith(f"bytes of shared memory, of {SM_90.shared:,}")

    # What is written is what was compiled: the launcher would ask for the other one else.
    generated = Generated(SM_90, "bfloat16", "Under test.", "", "", (made,), ())
    written = files(generated, [found])
    text = written["kernels.py"].decode()
    assert f"(None, dict({usual.text()}))" in text and first.text() not in text
    show_kernels(generated, [found])
    assert (
        f"tiling: {kernel.name} with {first.text()}: {found.because}; {usual.text()} instead"
        in capsys.readouterr().out
    )


def stand_in(monkeypatch, outcomes: dict[int, tuple[int, int] | str]) -> list[int]:
    """Compiles nothing: by its count of warps, a tiling spills so much and takes so much shared
    memory, or is refused. Returns what is asked for, as it is."""
    asked: list[int] = []

    def made(kernel: Kernel, config: Config):
        asked.append(config.num_warps)
        outcome = outcomes[config.num_warps]
        if isinstance(outcome, str):
            return UserError(outcome)
        spills, shared = outcome
        nowhere = Path("nowhere")
        return Binary(
            kernel, config, SM_90, nowhere, nowhere, 255, 0, spills, shared, {}, 1.0, False
        )

    monkeypatch.setattr(ahead, "try_ahead", lambda jobs, *_: [made(*job) for job in jobs])
    return asked


def kernel(*warps: int) -> tuple[Kernel, Config]:
    first, *others = (Config({}, n, upto=None) for n in warps)
    return Kernel("made_up", "", (size("n"),), (first,), tuple(others)), first


def test_what_spills_gives_way_to_the_first_that_does_not(monkeypatch) -> None:
    asked = stand_in(monkeypatch, {1: (109, 0), 2: "no such layout", 4: (3, 0), 8: (0, 9)})
    (found,) = fit.fitting([kernel(1, 2, 1, 4, 8, 16)], SM_90)
    assert asked == [1, 2, 4, 8]
    assert found.config.num_warps == 8
    assert found.because == "109 of its instructions spill registers"


def test_of_those_that_all_spill_the_least_is_taken(monkeypatch) -> None:
    stand_in(monkeypatch, {1: (109, 0), 2: (3, 0), 4: (0, 1 << 20)})
    (found,) = fit.fitting([kernel(1, 2, 4)], SM_90)
    assert (found.config.num_warps, found.spills) == (2, 3)


def test_what_was_wanted_stays_where_all_else_is_worse(monkeypatch) -> None:
    stand_in(monkeypatch, {1: (5, 0), 2: (9, 0)})
    (found,) = fit.fitting([kernel(1, 2)], SM_90)
    assert found.config.num_warps == 1 and found.replaces is None
    assert found.because == (
        "5 of its instructions spill registers, and all other tilings that were tried are worse"
    )


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (
            (0, 1 << 20),
            "no tiling of kernel made_up fits sm_90: it takes 1,048,576 bytes of shared",
        ),
        ("Triton 9 cannot compile kernel made_up", "Triton 9 cannot compile kernel made_up"),
    ],
)
def test_what_cannot_run_at_all_is_refused(outcome, message: str, monkeypatch) -> None:
    stand_in(monkeypatch, {1: outcome, 2: outcome})
    with pytest.raises(UserError, match=message):
        fit.fitting([kernel(1, 2)], SM_90)


def test_a_compiler_that_dies_is_started_again(tmp_path: Path, monkeypatch) -> None:
    """One tiling's crash says nothing of the next."""
    monkeypatch.setenv("DSLC_KERNEL_CACHE", str(tmp_path))
    text = "@triton.jit\ndef made_up(n):\n    pass\n"
    dying = Kernel("made_up", "import os\nos._exit(3)\n" + text, (size("n"),), (Config({}, 1),))
    whole = Kernel("made_up", text, (size("n"),), (Config({}, 1),))
    died, made = ahead.try_ahead(
        [(dying, dying.configs[0]), (whole, whole.configs[0])], SM_90, processes=1
    )
    assert isinstance(died, UserError) and "its compiler died: status 3" in str(died)
    assert isinstance(made, Binary) and made.spills == 0
