"""``dslc tune``: tilings tried, kept, found again, and used where kernels are generated."""

import json
from dataclasses import replace

import pytest
import running_kernels  # noqa: F401 - mends the interpreter's conversions
import torch

import dslc
from backends.triton import tuning
from backends.triton.families import combine, rotary
from backends.triton.targets import SM_90, SM_100
from backends.triton.tuning import Table
from compiler.errors import UserError
from dslc import cli
from dslc.bench.gpu import tuning as trying
from dslc.bench.gpu.compiled import operators_of

FEW = {"tokens": 3}
COMBINE = replace(combine.generate(combine.CombineSpec(2, 16), SM_90), shown=FEW)
ROTARY = replace(rotary.generate(rotary.RotarySpec(2, 8), SM_90), shown=FEW)


class Clock:
    """A machine without a GPU: the n-th tiling takes as long as the n-th number."""

    name, device, target = "A GPU", "cpu", SM_90

    def __init__(self, *seconds: float):
        self.left = list(seconds)

    def seconds(self, calls) -> float:
        for call in calls:
            call()
        return self.left.pop(0)


def tune(tmp_path, clock, operators=(COMBINE,), table=None, seconds=60.0, most=3):
    table = table or Table("A GPU", "sm_90", "3.7.1")
    path = tmp_path / "gpu.json"
    done = trying.tune(
        clock, operators, table, path, seconds=seconds, most=most, progress=lambda _: None
    )
    return table, done


def test_the_fastest_is_kept_and_used(tmp_path) -> None:
    table, done = tune(tmp_path, Clock(3e-3, 1e-3, 2e-3))
    assert done == (1, 0, [])
    kernel = COMBINE.kernels[0]
    tried = trying.tilings(kernel, 0, 3)
    assert tried[0] == kernel.configs[0] and len({config.text() for config in tried}) == 3
    assert table.apply(COMBINE).kernels[0].configs == (tried[1],)
    kept = tuning.read(tmp_path / "gpu.json")
    assert kept == table and kept.apply(COMBINE) == table.apply(COMBINE)
    assert kept.kernels[tuning.key(kernel)][0]["seconds"] == 1e-3


def test_what_is_known_is_not_tried_again(tmp_path) -> None:
    table, _ = tune(tmp_path, Clock(3e-3, 1e-3, 2e-3))
    assert tune(tmp_path, Clock(), table=table)[1] == (0, 0, [])


def test_a_run_that_is_out_of_time_says_what_is_left(tmp_path) -> None:
    assert tune(tmp_path, Clock(), (COMBINE, ROTARY), seconds=0)[1] == (0, 2, [])
    assert not (tmp_path / "gpu.json").exists()


def test_an_operator_without_an_example_is_named(tmp_path) -> None:
    silent = replace(COMBINE, example=None)
    assert tune(tmp_path, Clock(), (silent,))[1] == (0, 0, [COMBINE.name])


def test_a_tiling_that_does_not_run_is_passed_over(tmp_path) -> None:
    class Small(Clock):
        def seconds(self, calls) -> float:
            taken = super().seconds(calls)
            if taken < 0:
                raise RuntimeError("out of resources: shared memory")
            return taken

    table, _ = tune(tmp_path, Small(3e-3, -1.0, 2e-3))
    tried = trying.tilings(COMBINE.kernels[0], 0, 3)
    assert table.apply(COMBINE).kernels[0].configs == (tried[2],)


def test_each_bound_has_a_tiling_of_its_own(tmp_path) -> None:
    kernel = COMBINE.kernels[0]
    two = (replace(kernel.configs[0], upto=4), kernel.candidates[0])
    bounded = replace(COMBINE, kernels=(replace(kernel, configs=two),))
    table, _ = tune(tmp_path, Clock(1e-3, 2e-3, 2e-3, 1e-3), (bounded,), most=2)
    few, many = table.apply(bounded).kernels[0].configs
    assert few.upto == 4 and many.upto is None and few.text() != many.text()


def test_another_text_has_no_tilings_yet(tmp_path) -> None:
    table, _ = tune(tmp_path, Clock(3e-3, 1e-3, 2e-3))
    kernel = COMBINE.kernels[0]
    other = replace(kernel, source=kernel.source.replace("total", "sums"))
    changed = replace(COMBINE, kernels=(other,))
    assert table.apply(changed) == changed


def test_tables_are_found_by_target_and_gpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(tuning.OWN, str(tmp_path))
    assert tuning.find(SM_90) is None
    for gpu, target in (("B", "sm_90"), ("A", "sm_90"), ("C", "sm_100")):
        Table(gpu, target, "3.7.1").write(tmp_path / f"{gpu}.json")
    assert tuning.find(SM_90).gpu == "A" and tuning.find(SM_90, "B").gpu == "B"
    assert tuning.find(SM_100).gpu == "C"
    monkeypatch.setenv(tuning.OWN, str(tmp_path / "B.json"))
    assert tuning.find(SM_90).gpu == "B" and tuning.find(SM_100) is None


def test_the_users_tables_come_before_those_that_ship(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(tuning.OWN, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    Table("Shipped", "sm_90", "3.7.1").write(tmp_path / "shipped" / "gpu.json")
    assert tuning.find(SM_90).gpu == "Shipped"
    Table("Own", "sm_90", "3.7.1").write(tuning.default_path("Own"))
    assert tuning.find(SM_90).gpu == "Own"


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "gpu": "A"}'])
def test_what_is_no_table_is_named(tmp_path, text) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"table\.json is no table of tuned kernels"):
        tuning.read(path)


def test_rows_must_be_tilings(tmp_path) -> None:
    path = tmp_path / "table.json"
    row = {"upto": None, "constants": {"BLOCK": "wide"}, "num_warps": 4, "num_stages": 1}
    about = {"format": 1, "gpu": "A", "target": "sm_90", "triton": "3"}
    path.write_text(json.dumps({**about, "kernels": {"k": [row]}}))
    with pytest.raises(UserError, match="no table"):
        tuning.read(path)


def test_compiling_uses_the_table(tmp_path, monkeypatch) -> None:
    """The kernels of a compiled directory are generated again, tuned, and then found tuned."""
    monkeypatch.setenv(tuning.OWN, str(tmp_path / "none.json"))
    program = dslc.compile("dsv3", dims="small", target="sm_90")
    before = program.generated.operators
    chosen = next(op for op in before if op.kernels[0].candidates)
    other = next(
        c for c in chosen.kernels[0].candidates if c.text() not in program.generated.kernels
    )
    table = Table("A GPU", "sm_90", "3.7.1")
    table.add(
        chosen.kernels[0], [(replace(other, upto=c.upto), 1.0) for c in chosen.kernels[0].configs]
    )
    table.write(tmp_path / "gpu.json")
    monkeypatch.setenv(tuning.OWN, str(tmp_path / "gpu.json"))
    tuned = dslc.compile("dsv3", dims="small", target="sm_90").generated
    after = {op.name: op for op in tuned.operators}[chosen.name]
    assert {config.text() for config in after.kernels[0].configs} == {other.text()}
    assert other.text() in tuned.kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_message_says_so(capsys) -> None:
    assert cli.run(["tune", "build/small"]) == 1
    said = "error: kernels are tuned by timing them, and torch sees no GPU here\n"
    assert capsys.readouterr().err == said


def test_a_directory_for_the_cpu_has_no_kernels(tmp_path) -> None:
    dslc.compile("dsv3", dims="small").save(tmp_path / "small")
    with pytest.raises(UserError, match="compiled for the CPU, where there are no kernels to tune"):
        operators_of(tmp_path / "small", SM_90)
