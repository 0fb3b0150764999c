"""``dslc bench --kernels``: what is kept, gone on with and shown; with a stub for the GPU."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import running_kernels  # noqa: F401 - mends the interpreter's conversions
import torch

from backends.triton.families import combine, rotary
from backends.triton.targets import SM_90
from compiler.errors import UserError
from dslc import cli
from dslc.bench.gpu import machine, published, rivals
from dslc.bench.gpu.cases import Case, cases
from dslc.bench.gpu.command import show_record
from dslc.bench.gpu.machine import Roof
from dslc.bench.gpu.record import Record, default_path
from dslc.bench.gpu.timing import time_cases

VERSIONS = {"torch": "2.11", "triton": "3.6"}


class Clock:
    """A machine without a GPU: calls are made, and take as long as it says."""

    name, device, target = "A GPU", "cpu", SM_90

    def __init__(self) -> None:
        self.timed = 0

    def seconds(self, calls) -> float:
        self.timed += 1
        for call in calls:
            call()
        return 1e-3 * self.timed

    def roof(self) -> Roof:
        return Roof(1e9, {"bfloat16": 1e12})


def small_cases() -> list[Case]:
    turned = rotary.generate(rotary.RotarySpec(2, 8), SM_90)
    summed = combine.generate(combine.CombineSpec(2, 16, 1), SM_90)
    plain = {"torch": lambda *given: lambda: rivals_sum(*given)}
    lacking = {"FlexAttention": lambda *given: missing()}
    figure = published.Published(2.0, "somewhere", 1.5)
    return [
        Case("rotary", turned, {"tokens": 3}, turned.example, lacking, near=None),
        Case("combine", summed, {"tokens": 5}, summed.example, plain, figure),
    ]


def rivals_sum(rows, row_of, weight, added):
    return (rows[row_of].float() * weight[..., None]).sum(1).add(added.float()).to(rows.dtype)


def missing():
    raise RuntimeError("this torch has none\nmore lines")


def timed(path, clock=None, some=None, seconds=60.0) -> tuple[Record, int]:
    record = Record(path, "A GPU", VERSIONS)
    left = time_cases(clock or Clock(), some or small_cases(), record, seconds, lambda _: None)
    return record, left


def test_rows_hold_times_bounds_rivals_and_differences(tmp_path) -> None:
    record, left = timed(tmp_path / "gpu.json")
    assert left == 0 and json.loads((tmp_path / "gpu.json").read_text()) == record.data
    rotary, combine = record.rows["rotary"], record.rows["combine"]
    assert rotary["absent"] == {"FlexAttention": "RuntimeError: this torch has none"}
    assert rotary["bytes"] == rotary["least_bytes"] == 3 * (2 * 2 * 8 * 2 + 2 * 4 * 4)
    assert combine["seconds"] == 2e-3 and combine["torch"] == {"torch": 3e-3}
    assert combine["difference"] < 1e-2 and combine["differs"] is False
    assert combine["published"]["source"] == "somewhere"
    assert combine["roof_seconds"] == pytest.approx(combine["bytes"] / 1e9)


def test_a_run_goes_on_where_one_was_broken_off(tmp_path) -> None:
    path, clock = tmp_path / "gpu.json", Clock()
    assert timed(path, clock, seconds=0)[1] == 2
    assert clock.timed == 0
    timed(path, clock, small_cases()[:1])
    before = clock.timed
    record, left = timed(path, clock)
    assert left == 0 and set(record.rows) == {"rotary", "combine"}
    assert clock.timed == before + 2  # combine and its rival; rotary was kept
    assert timed(path, clock)[1] == 0 and clock.timed == before + 2


def test_another_text_is_timed_again(tmp_path) -> None:
    path, clock = tmp_path / "gpu.json", Clock()
    timed(path, clock)
    case = small_cases()[0]
    kernel = case.operator.kernels[0]
    other = replace(kernel, configs=(kernel.candidates[-1],))
    changed = replace(case, operator=replace(case.operator, kernels=(other,)))
    before = clock.timed
    timed(path, clock, [changed])
    assert clock.timed == before + 1


def test_other_versions_start_anew(tmp_path) -> None:
    path = tmp_path / "gpu.json"
    timed(path)
    assert Record(path, "A GPU", {"torch": "2.13", "triton": "3.7"}).rows == {}


def test_a_kernel_that_fails_is_a_row_and_is_tried_again(tmp_path) -> None:
    case = small_cases()[0]
    broken = replace(case, example=lambda sizes, device: (None,))
    record, left = timed(tmp_path / "gpu.json", some=[broken, small_cases()[1]])
    assert left == 0 and "TypeError" in record.rows["rotary"]["failed"]
    assert "seconds" in record.rows["combine"]
    again, _ = timed(tmp_path / "gpu.json")
    assert "failed" not in again.rows["rotary"]


def test_a_wrong_result_is_told(tmp_path, capsys) -> None:
    case = small_cases()[1]
    wrong = {"torch": lambda *given: lambda: torch.zeros_like(given[3])}
    record, _ = timed(tmp_path / "gpu.json", some=[replace(case, rivals=wrong)])
    show_record(record.data)
    assert "combine differs from torch's by" in capsys.readouterr().err


def test_the_table(tmp_path, capsys) -> None:
    record, _ = timed(tmp_path / "gpu.json")
    show_record(record.data)
    shown, noted = capsys.readouterr()
    lines = shown.splitlines()
    assert lines[0].startswith("A GPU, 20") and lines[0].endswith("torch 2.11, triton 3.6")
    assert lines[1] == "the roof: 1 GB/s copied; torch's products 1 TFLOPS in bfloat16"
    combine = next(line for line in lines if line.lstrip("│| ").startswith("combine"))
    for cell in ("2.0000", "3.0000", "torch", "1.50", "met"):
        assert cell in combine
    assert "rotary: FlexAttention does not take part: RuntimeError: this torch has none" in noted


def test_timings_of_another_gpu_are_not_mixed(tmp_path) -> None:
    timed(tmp_path / "gpu.json")
    with pytest.raises(UserError, match="holds what was timed on A GPU; this is Another"):
        Record(tmp_path / "gpu.json", "Another", VERSIONS)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99, "rows": {}, "gpu": "A GPU"}'])
def test_a_file_that_holds_something_else_is_kept(tmp_path, text) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(UserError, match="holds no timings that this version can go on with"):
        Record(path, "A GPU", VERSIONS)
    assert path.read_text() == text


def test_the_file_is_named_after_the_gpu() -> None:
    path = default_path("NVIDIA H100 80GB HBM3")
    assert path.as_posix() == "benchmarks/results/nvidia-h100-80gb-hbm3.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(capsys) -> None:
    assert cli.run(["bench", "--kernels"]) == 0
    shown, noted = capsys.readouterr()
    assert shown == "" and noted == "note: kernels are not timed: torch sees no GPU here\n"
    assert cli.run(["bench", "--kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"skipped": "torch sees no GPU here"}


def test_a_model_needs_a_directory(capsys) -> None:
    assert cli.run(["bench"]) == 1
    message = "error: dslc bench takes a directory that dslc compile wrote, or --kernels\n"
    assert capsys.readouterr().err == message


def test_every_published_figure_is_beside_a_case() -> None:
    beside = [case.published for case in cases(SM_90) if case.published]
    figures = sum(len(times) for times in published.GEMM.values()) + len(published.DECODE) + 1
    assert len(beside) == figures
    assert all(figure.source and figure.milliseconds > 0 for figure in beside)


def test_every_case_has_a_name_of_its_own_a_rival_and_few_bytes_beyond_its_bound() -> None:
    found = list(cases(SM_90))
    assert len({case.name for case in found}) == len(found) > 30
    for case in found:
        cost = case.operator.traffic(case.sizes)
        assert case.rivals and 0 < cost.bytes <= 1.2 * cost.bound, case.name


@pytest.mark.parametrize("name", ["rotary 128", "combine", "router", "dispatch", "greedy"])
def test_rivals_compute_what_kernels_do(name, monkeypatch) -> None:
    """At the sizes that an interpreter takes: one token, or four."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = next(case for case in cases(SM_90) if case.name.startswith(name))
    sizes = dict.fromkeys(case.sizes, 2)
    given = case.example(sizes, "cpu")
    module = machine.loaded(case.operator)
    ours = getattr(module, case.operator.name)(*given)
    theirs = next(iter(case.rivals.values()))(*given)()
    ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (ours, theirs))
    for a, b in zip(ours, theirs, strict=False):
        if a.shape == b.shape:
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)
    assert ours[0].shape == theirs[0].shape


@pytest.mark.parametrize("name", ["latent prefill", "grouped prefill", "latent dec", "grouped dec"])
def test_attention_rivals_compute_what_kernels_do(name) -> None:
    """Prompts from their first position on, as torch's causal mask has them."""
    case = next(case for case in cases(SM_90) if case.name.startswith(name))
    tokens = 20 if "prefill" in name else 1
    given = case.example(
        {"tokens": tokens, "history": 20 if tokens > 1 else 64, "sequences": 1}, "cpu"
    )
    ours = getattr(machine.loaded(case.operator), case.operator.name)(*given)
    theirs = case.rivals["SDPA"](*given)()
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=3e-2, atol=3e-2)


def test_rivals_by_name() -> None:
    assert set(rivals.gemm()) >= {"torch._scaled_mm", "torch.mm of BF16"}
    assert set(rivals.grouped(coded=True)) == {"F.grouped_mm of BF16"}


# -- make gpu --------------------------------------------------------------------------------------


def make_gpu():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("make_gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_make_gpu_is_skipped_without_one(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert make_gpu().main() == 0
    assert capsys.readouterr() == ("", "make gpu: skipped: torch sees no GPU here\n")


def test_make_gpu_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys) -> None:
    """Three files of tests: one passes, one fails, for the third there is no time yet."""
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    for name in "abc":
        (tmp_path / "tests" / "kernels" / f"test_{name}.py").write_text("")
    module, ran, timed = make_gpu(), [], []
    outcomes = iter(["passed", "failed", "stopped", "passed", "passed"])
    monkeypatch.setattr(machine, "absent", lambda: None)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "test", lambda name, *_: ran.append(name[-4]) or next(outcomes))
    monkeypatch.setattr(module, "bench", lambda left: timed.append(left) or 0)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert module.main() == 1 and ran == ["a", "b", "c"] and not timed
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        "make gpu: 1 of 3 files of tests passed, 1 failed",
        "make gpu: 1 are left, and the timings: the same command goes on",
    ]
    assert module.main() == 0 and ran == ["a", "b", "c", "b", "c"] and len(timed) == 1
    assert module.main() == 0 and len(ran) == 5 and len(timed) == 2
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "changed.py").write_text("")
    monkeypatch.setattr("sys.argv", ["gpu.py", "--seconds", "1"])
    assert module.main() == 0 and len(ran) == 5  # another tree, and no time for it
    assert "make gpu: 3 are left" in capsys.readouterr().out


TWO = """
def test_first():
    open({ran!r}, "a").write("first ")

def test_second():
    open({ran!r}, "a").write("second ")
    assert {well}
"""


def test_make_gpu_goes_on_within_a_file(tmp_path, monkeypatch) -> None:
    """What has passed when a file of tests is stopped, or fails, is not run again."""
    module, ran = make_gpu(), tmp_path / "ran.txt"
    (tmp_path / "benchmarks").symlink_to(module.ROOT / "benchmarks")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for well, outcome in ((False, "failed"), (True, "passed"), (True, "passed")):
        (tmp_path / "test_two.py").write_text(TWO.format(ran=str(ran), well=well))
        assert module.test("test_two.py", 100.0, tmp_path / "kept" / "passed.txt") == outcome
    assert ran.read_text() == "first second second "
