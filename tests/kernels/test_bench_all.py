"""Everything that ``dslc bench --kernels`` and ``dslc tune`` do on a GPU, once, without one: at
tiny sizes in Triton's interpreter, with a stand-in for the clock."""

import contextlib
from dataclasses import replace

import pytest
import torch

from backends.triton import interpreted
from backends.triton.targets import GFX942, SM_90, TARGETS
from backends.triton.tuning import Table
from dslc.bench.gpu import machine
from dslc.bench.gpu import tuning as trying
from dslc.bench.gpu.cases import PUBLISHED, TINY, cases
from dslc.bench.gpu.command import show_record, time_all
from dslc.bench.gpu.compiled import operators_of
from dslc.bench.gpu.record import Record
from dslc.program import Program, compile_file

VERSIONS = {"torch": "2.13", "triton": "3.7"}


class Clock:
    """Calls are made, and take a second."""

    name, device, target = "A GPU", "cpu", SM_90

    def seconds(self, calls) -> float:
        for call in calls:
            call()
        return 1.0

    def roof(self) -> machine.Roof:
        return machine.Roof(1e9, {"bfloat16": 1e12, "float8_e4m3fn": 2e12})


@pytest.fixture(autouse=True)
def in_the_interpreter(monkeypatch) -> None:
    interpreted.install()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(Program, "binaries", lambda self, progress=None: [])


def test_every_kernel_its_rivals_and_a_whole_layer(tmp_path, capsys) -> None:
    record = Record(tmp_path / "gpu.json", "A GPU", VERSIONS)
    left, count = time_all(Clock(), record, 3600, lambda _: None, tiny=True)
    assert left == 0 and len(record.rows) == count > 20
    assert {name: row["failed"] for name, row in record.rows.items() if "failed" in row} == {}
    differing = [name for name, row in record.rows.items() if row.get("differs")]
    assert differing == []
    # What torch has on a GPU alone; all else takes part.
    absent = {rival for row in record.rows.values() for rival in row["absent"]}
    assert absent <= {"torch._scaled_mm", "F.grouped_mm of BF16", "FlexAttention"}
    show_record(record.data)
    shown = capsys.readouterr().out
    assert "MoE layer, prefill 9 tokens" in shown and "MoE layer, decode 2 x 70" in shown
    assert "2 x torch: missed" in shown  # a second each


def test_a_layer_that_was_timed_is_not_timed_again(tmp_path) -> None:
    record = Record(tmp_path / "gpu.json", "A GPU", VERSIONS)
    record.set_roof({"bytes_per_second": 1e9, "flops": {"bfloat16": 1e12}})
    asked = {"progress": lambda _: None, "only": "prefill 9", "tiny": True}
    assert time_all(Clock(), record, 3600, **asked) == (0, 1)
    row = record.rows["MoE layer, prefill 9 tokens"]
    assert row["torch"] and row["difference"] < 0.5 and row["aim_speedup"] == 2.0
    told: list[str] = []
    assert time_all(Clock(), record, 3600, told.append, "prefill 9", True) == (0, 1)
    assert told == []


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_there_are_cases_for_every_gpu(target) -> None:
    names = [case.name for case in cases(target, PUBLISHED)]
    assert len(set(names)) == len(names) > 20
    assert any("FP8" in name for name in names) == target.fp8


def test_all_kernels_of_a_model_are_tuned(tmp_path) -> None:
    """Each has an example of its arguments, and its launcher takes them."""
    program = compile_file("dsv3", target="sm_90", dims="small", deploy="fp8")
    program.save(tmp_path / "model")
    operators = []
    for operator in operators_of(tmp_path / "model", SM_90):
        sizes = {"tokens": 3, "sequences": 1, "history": 65}
        kernels = tuple(
            replace(k, configs=k.configs[-1:], candidates=k.candidates[:1])
            for k in operator.kernels
        )
        shown = {name: sizes[name] for name in operator.shown}
        operators.append(replace(operator, kernels=kernels, shown=shown))
    table = Table("A GPU", "sm_90", "3.7.1")
    done, left, without = trying.tune(
        Clock(),
        operators,
        table,
        tmp_path / "tuned.json",
        seconds=3600,
        most=2,
        progress=lambda _: None,
    )
    assert without == [] and left == 0 and done > 20


# -- the clock of a GPU ----------------------------------------------------------------------------


class Event:
    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end) -> float:
        return 2.0  # milliseconds


class Graph:
    captured = replayed = 0

    def replay(self) -> None:
        Graph.replayed += 1


@contextlib.contextmanager
def capturing(graph):
    Graph.captured += 1
    yield


@pytest.fixture
def gpu(monkeypatch) -> machine.Gpu:
    """torch.cuda by its names, none of which does anything."""
    stand_ins = {
        "get_device_name": lambda: "A GPU",
        "get_device_capability": lambda: (9, 0),
        "synchronize": lambda: None,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capturing,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(machine, "SIDE", 32)
    monkeypatch.setattr(machine, "COPIED", 1 << 10)
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, *_, **__: a)
    found = machine.Gpu()
    found.device = "cpu"
    return found


def test_calls_are_timed_in_a_graph_and_the_roof_with_them(gpu) -> None:
    calls: list[int] = []
    assert gpu.target is SM_90 and gpu.name == "A GPU"
    captured = Graph.captured
    assert gpu.seconds([lambda: calls.append(1), lambda: calls.append(2)]) == 1e-3
    assert calls == [1, 2, 1, 2] and Graph.captured == captured + 1
    roof = gpu.roof()
    assert roof.bytes_per_second == 2 * 1024 / 2e-3
    assert roof.flops == dict.fromkeys(("bfloat16", "float8_e4m3fn"), 2 * 32**3 / 2e-3)


def test_calls_that_wait_for_the_gpu_are_timed_one_by_one(gpu, monkeypatch) -> None:
    @contextlib.contextmanager
    def refusing(graph):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refusing)
    calls: list[int] = []
    replayed = Graph.replayed
    assert gpu.seconds([lambda: calls.append(1)]) == 2e-3
    assert len(calls) > 20 and Graph.replayed == replayed


def test_an_amd_gpu_has_no_cases_in_fp8() -> None:
    assert [case.name for case in cases(GFX942, TINY) if "FP8" in case.name] == []
