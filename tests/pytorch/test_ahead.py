"""Decode steps compiled ahead of time: what they give is what model.py gives."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from small import SIZES
from test_own_models import HEAD, SOURCES, TAIL

import dslc
from backends.pytorch.ahead.blocks import BlockedWeight
from backends.pytorch.ahead.build import build, stored_blocks, traced
from backends.pytorch.ahead.decoder import Decoder, Run, obstacle
from backends.pytorch.ahead.plan import FILE_NAME, Plan
from backends.pytorch.model import Model
from backends.pytorch.runtime import Step
from compiler import directory, manifest
from compiler.tensors import ignored, patterns
from dslc import cli
from dslc.program import Program

Blocked = Mapping[str, tuple[int, int]]
NONE: Blocked = MappingProxyType({})
PROMPT = torch.arange(66)[None] * 7 % 20  # with what follows, longer than any example, or cache
ODD = {
    "dsv3": SIZES,
    "dsv2": {},
    "dsv3_2": {},
    "llama3": {},
    "qwen2_5": {},
    "mixtral": {"sliding_window": 6},
    "qwen3_moe": {},
}


def traced_model(
    program: Program, folder: Path, checkpoint: Path | None = None, blocked: Blocked = NONE
) -> Model:
    """The model with a decode step that is run as it was traced, without Inductor."""
    plan, programs = traced(program.code(), "float32", blocked=blocked)
    program.save(folder)
    about = manifest.read(folder)
    files = manifest.verified_files(folder, about)
    files[FILE_NAME] = plan.model_dump_json().encode()
    files |= dict.fromkeys(programs, b"")
    hashes = {name: manifest.digest(data) for name, data in files.items()}
    directory.write(folder, about.model_copy(update={"files": hashes}), files)
    with pytest.MonkeyPatch.context() as patch:
        runs = {name: as_it_is(exported) for name, exported in programs.items()}
        patch.setattr("backends.pytorch.load.loaded", lambda plan, files: runs)
        model = dslc.load(folder, checkpoint, dtype="float32")
    assert model.decodes_ahead
    return model


def as_it_is(exported: torch.export.ExportedProgram) -> Run:
    module = exported.module(check_guards=False)
    spec = exported.call_spec.in_spec

    def run(given: list[torch.Tensor]) -> list[torch.Tensor]:
        args, kwargs = torch.utils._pytree.tree_unflatten(given, spec)
        result = module(*args, **kwargs)
        return list(result) if isinstance(result, tuple | list) else [result]

    return run


def held(model: Model, new: int = 12) -> None:
    """Step by step with and without the compiled step, on the same tokens."""
    ours, plain = model.new_cache(1), model.new_cache(1)
    decoder = model._decoder
    assert isinstance(decoder, Decoder)
    with torch.no_grad():
        token = model(PROMPT, cache=ours, last_only=True).argmax(-1)
        model(PROMPT, cache=plain)
        for _ in range(new):
            model._decoder = None
            expected = model(token, cache=plain)
            model._decoder = decoder
            found = model(token, cache=ours)
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
            token = found.argmax(-1)
    assert ours.lengths == plain.lengths == [PROMPT.shape[1] + new]


@pytest.mark.parametrize("name", ODD)
def test_a_shipped_model(name, tmp_path):
    held(traced_model(dslc.compile(name, dims="small", set=ODD[name]), tmp_path / "made"))


@pytest.mark.parametrize("name", SOURCES)
def test_models_of_ones_own_whose_entries_have_no_layers(name, tmp_path):
    (tmp_path / "own.arch").write_text(HEAD + SOURCES[name] + TAIL)
    held(traced_model(dslc.compile(tmp_path / "own.arch"), tmp_path / "made"))


def test_a_history_that_nothing_is_kept_of_is_refused(tmp_path):
    """Its length would be that of the example."""
    block = """
block Mixer[d] {
  param gain[d]
  def (x[t,d]) -> y[t,d] {
    seen[t] = sum[s](where(position[s] <= position[t], 0.01 * position[s], 0))
    y[t,d] = gain[d] * x[t,d] * seen[t]
  }
}"""
    (tmp_path / "own.arch").write_text(HEAD + block + TAIL)
    with pytest.raises(dslc.UserError, match="positions of a history are read of which nothing"):
        traced(dslc.compile(tmp_path / "own.arch").code(), "float32")


def test_layers_of_one_kind_are_compiled_once():
    def parts(layers: int) -> tuple[Plan, int]:
        program = dslc.compile("dsv3", set={**SIZES, "layers": layers})
        plan, programs = traced(program.code(), "float32")
        return plan, len(programs)

    (few, pieces), (many, same) = parts(3), parts(9)
    assert pieces == same == 4  # before the layers, a dense one, a sparse one, behind them
    assert len(many.calls) == len(few.calls) + 6
    first, last = many.calls[2], many.calls[9]
    assert first.piece == last.piece
    assert "layers.1.mlp.expert.*.W_up" in first.weights
    assert "layers.8.mlp.expert.*.W_up" in last.weights
    assert first.caches == ("layers.1.attn.c_kv", "layers.1.attn.k_r")
    before, behind = many.calls[0], many.calls[-1]
    assert "embed" in before.weights and "head" not in before.weights
    assert "head" in behind.weights


def test_fp8_weights_are_read_as_they_are_stored(tmp_path):
    """Each row of a product is multiplied with bytes and scales; what is used otherwise is wide."""
    sizes = {**SIZES, "hidden": 140, "expert_ffn": 130}  # blocks of 128 are cut at the edges
    checkpoint = tmp_path / "checkpoint"
    given = [word for n, value in sizes.items() for word in ("--set", f"{n}={value}")]
    assert cli.run(["init", str(checkpoint), "dsv3", *given, "--deploy", "fp8"]) == 0
    program = dslc.compile("dsv3", checkpoint=checkpoint)
    elaborated = program.after("elaborate")
    stored = stored_blocks(checkpoint, patterns(elaborated), ignored(elaborated))
    assert {"layers.0.mlp.W_up", "layers.1.attn.W_ukv", "layers.2.mlp.expert.5.W_up"} <= {*stored}
    model = traced_model(program, tmp_path / "made", checkpoint, stored)
    experts = model.module.layers[1].mlp.expert
    assert isinstance(experts[3].W_up.data, BlockedWeight)
    assert experts[3].W_up.data.data8.dtype == torch.uint8
    assert not isinstance(model.module.layers[1].attn.W_ukv.data, BlockedWeight)
    held(model)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert torch.equal(model.state_dict()[name], experts[3].W_up.float())  # can be saved
    with pytest.raises(dslc.UserError, match="kept in FP8 cannot be replaced: pass assign=True"):
        model.load_state_dict(model.state_dict())
    program.save(tmp_path / "wide")
    wide = dslc.load(tmp_path / "wide", checkpoint, dtype="float32")
    assert torch.equal(experts[3].W_up.float(), wide.module.layers[1].mlp.expert[3].W_up)
    notes: list[str] = []
    assert not dslc.load(tmp_path / "made", note=notes.append).decodes_ahead
    assert notes == [
        "the compiled decode step is not used: it is for FP8 weights in blocks of 128 x 128"
    ]


@pytest.fixture(scope="module")
def optimized(tmp_path_factory) -> Path:
    """A model compiled by Inductor, through the command: once for all of the tests' processes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "dslc-ahead" / "made"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            sizes = {**SIZES, "dense": 0}  # one kind of layer: a piece less to compile
            given = [word for n, value in sizes.items() for word in ("--set", f"{n}={value}")]
            command = [sys.executable, "-m", "dslc", "compile", "dsv3", *given, "-o", str(folder)]
            done = subprocess.run(
                [*command, "--optimize", "--dtype", "float32"], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
    return folder


def test_machine_code_gives_what_model_py_gives(optimized):
    held(dslc.load(optimized))


def test_generation_is_the_same_with_it_and_without(optimized):
    with_it, without = dslc.load(optimized), dslc.load(optimized)
    without._decoder = None
    options = {"max_new_tokens": 20, "temperature": 0.7, "seed": 3}
    assert with_it.generate(PROMPT, **options).tolist() == (
        without.generate(PROMPT, **options).tolist()
    )


def test_it_decides_the_dtype_where_nobody_does_and_steps_aside_in_another(optimized):
    assert dslc.load(optimized).notes == []
    with pytest.warns(UserWarning, match="it is for float32, the model is in bfloat16"):
        model = dslc.load(optimized, dtype="bfloat16")
    assert model._decoder is None
    model.generate(PROMPT, max_new_tokens=2)


def test_weights_that_change_are_seen_and_weights_that_move_end_it(optimized):
    model = dslc.load(optimized)
    with torch.no_grad():
        model.module.layers[1].mlp.expert[3].W_up.mul_(2)  # in place, in the array
    held(model)
    model.load_state_dict(dslc.load(optimized, seed=1).state_dict())
    held(model)
    assert model.to(torch.float64)._decoder is None


def step(model: Model, token: int, **options: object) -> torch.Tensor:
    cache = model.new_cache(2)
    with torch.no_grad():
        model(PROMPT.repeat(2, 1), cache=cache)
        return model.step(
            "main", Step([1], cache=cache, **options), {"token": torch.tensor([token])}
        )


def test_packed_steps_of_one_token(optimized):
    """Any slot, rows that are not wanted, and tokens that are not there, as in model.py."""
    model, plain = dslc.load(optimized), dslc.load(optimized)
    plain._decoder = None
    for options in ({"slots": [1]}, {"rows": torch.zeros(0, dtype=torch.int64)}):
        found, expected = step(model, 7, **options), step(plain, 7, **options)
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(dslc.UserError, match=r"token 51 is not one of 0 \.\. 50"):
        step(model, 51)


def test_weights_in_another_place_are_not_overlooked(optimized):
    model = dslc.load(optimized)
    for parameter in model.module.parameters():
        parameter.data = parameter.data * 1.3
    plain = copy.deepcopy(model)
    assert not plain.decodes_ahead
    assert torch.allclose(step(model, 7), step(plain, 7), atol=1e-5)


def test_a_checkpoint_is_read_into_the_arrays(optimized, tmp_path):
    from small import write

    source = dslc.load(optimized, seed=5)
    folder = write(tmp_path / "checkpoint", source.state_dict(), dtype="float32")
    read = dslc.load(optimized, checkpoint=folder)
    for name, tensor in source.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    held(read)


PLAN = Plan(
    dtype="float32", torch=torch.__version__, machine="x86_64", features=(), calls=(), logits=0
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"torch": "2.99"}, f"torch 2.99 compiled it, this is {torch.__version__}"),
        ({"machine": "vax"}, "it was compiled for another CPU (vax, not {machine})"),
        (
            {"machine": "{machine}", "features": ("avx9",)},
            "it was compiled for another CPU (avx9 is not there)",
        ),
        ({"dtype": "bfloat16"}, "it is for bfloat16, the model is in float32"),
    ],
    ids=["torch", "machine", "feature", "dtype"],
)
def test_where_it_cannot_run(change, reason):
    import platform

    here = platform.machine()
    change = {k: here if v == "{machine}" else v for k, v in change.items()}
    plan = PLAN.model_copy(update={"machine": here, **change})
    found = obstacle(plan, torch.device("cpu"), torch.float32)
    assert found == reason.format(machine=here)


def damaged(folder: Path, to: Path, **files: bytes) -> Path:
    """A copy of a compiled directory with other files, its hashes right."""
    about = manifest.read(folder)
    held = manifest.verified_files(folder, about) | files
    hashes = {name: manifest.digest(data) for name, data in held.items()}
    directory.write(to, about.model_copy(update={"files": hashes}), held)
    return to


def test_a_package_that_is_none(optimized, tmp_path):
    folder = damaged(optimized, tmp_path / "bad", **{"decode/1.pt2": b"no archive"})
    with pytest.raises(dslc.UserError, match="the compiled decode step cannot be loaded: "):
        dslc.load(folder)


def test_a_plan_that_is_none(optimized, tmp_path):
    folder = damaged(optimized, tmp_path / "bad", **{FILE_NAME: b"{}"})
    with pytest.raises(dslc.UserError, match=r"decode.json: dtype: Field required"):
        dslc.load(folder)


def test_a_plan_that_names_another_file(optimized, tmp_path):
    plan = json.loads((optimized / FILE_NAME).read_text())
    plan["calls"][0]["piece"] = "decode/9.pt2"
    folder = damaged(optimized, tmp_path / "bad", **{FILE_NAME: json.dumps(plan).encode()})
    with pytest.raises(dslc.UserError, match=r"names decode/9.pt2, which is not there"):
        dslc.load(folder)


def test_states_are_refused():
    """They have no place among histories, and a step without them would say something else."""
    with pytest.raises(dslc.UserError) as raised:
        traced(dslc.compile("qwen3_next", dims="small").code(), "float32")
    assert str(raised.value) == (
        "--optimize: a step of one token cannot be traced: turn.0.linear.0.mix.u is kept without "
        "positions, as a state is"
    )


def test_each_part_of_the_work_is_told(monkeypatch):
    """It takes a minute, longer on a busy machine: who waits sees how far it is."""
    monkeypatch.setattr("backends.pytorch.ahead.build.packaged", lambda program: b"")
    told: list[str] = []
    build(dslc.compile("llama3", dims="small").code(), "float32", progress=told.append)
    pieces = len(told) - 1
    assert pieces >= 2
    assert told == [
        "tracing a step of one token",
        *(
            f"machine code, {n} of {pieces}: some ten seconds of a core each"
            for n in range(1, pieces + 1)
        ),
    ]


def test_what_cannot_be_traced_is_said(monkeypatch):
    program = dslc.compile("dsv3", set=SIZES)
    broken = replace(program).code().replace("torch.sigmoid(", "print(1 / 0) or (")
    with pytest.raises(dslc.UserError) as raised:
        traced(broken, "float32")
    assert str(raised.value) == (
        "--optimize: a step of one token cannot be traced: division by zero"
    )
