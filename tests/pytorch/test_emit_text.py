"""The text of model.py: readable, the same however large the model, whatever its names."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backends.pytorch.emit.module import emit
from backends.pytorch.emit.text import WIDTH, comment, split, spoken, wrapped
from backends.pytorch.model import attribute_path
from backends.pytorch.names import attribute, identifier
from backends.pytorch.runtime import Step
from compiler.ir import Dim, Program
from compiler.pipeline import compile_model
from dsl.constants import Choices
from dsl.extents import Extent
from tests.compiler.decoder import decoder
from tests.compiler.lowered import Body, dim, program, t
from tests.pytorch.running import Both, close, tiny

MODEL = "models/dsv3.arch"


@pytest.fixture(scope="module")
def shipped() -> Program:
    return compile_model(MODEL, Choices(preset="small")).program


@pytest.fixture(scope="module")
def text(shipped: Program) -> str:
    return emit(shipped)


# -- readable --------------------------------------------------------------------------------------


def test_one_class_per_block(text: str) -> None:
    classes = re.findall(r"^class (\w+)", text, re.MULTILINE)
    assert len(classes) == len(set(classes)) == len({c.rstrip("_0123456789") for c in classes})


def test_lines_fit_and_hold_no_generated_names(text: str) -> None:
    for line in text.splitlines():
        assert len(line) <= WIDTH, line
        assert line == line.rstrip()
        assert "%" not in line and not re.search(r"\b_?\d+\b\s*=|\(_\d", line)


def test_every_statement_stands_under_its_equation(text: str) -> None:
    for equation in (
        "# cq[t,r] = q_norm(W_dq[r,d] * x[t,d])  std/mla.arch:",
        "# y[d] = W_down[d,f] * a[f]  std/ffn.arch:",
        "# x1[t,d] = chain[a](layers, x0[t,d])  models/dsv3.arch:",
    ):
        assert equation in text
    assert "gate = F.linear(x, self.W_gate)" in text
    assert "for layer in self.layers[: self.a]:" in text


def test_only_torch_and_the_runtime_are_imported(text: str) -> None:
    imports = re.findall(r"^(?:import|from) (\S+)", text, re.MULTILINE)
    assert set(imports) == {"torch", "torch.nn.functional", "backends.pytorch.runtime"}


def test_it_is_formatted_and_has_no_unused_names(text: str, tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    file = tmp_path / "model.py"
    file.write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    done = subprocess.run(
        [*ruff, "check", "--isolated", "--select", "E,F,W", f"--line-length={WIDTH}", str(file)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    done = subprocess.run(
        [*ruff, "format", "--isolated", f"--line-length={WIDTH}", "--diff", str(file)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("changed", [{"layers": 610}, {"experts": 2560}, {"layers": 1, "dense": 1}])
def test_size_changes_numbers_only(text: str, changed: dict[str, int]) -> None:
    larger = emit(compile_model(MODEL, Choices(preset="small", set=changed)).program)
    numbers = re.compile(r"\d+(\.\d+)?(e-?\d+)?")
    assert numbers.sub("0", larger) == numbers.sub("0", text)


def test_emission_does_not_import_torch() -> None:
    code = "import sys, backends.pytorch.emit.module; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the model -------------------------------------------------------------------------------------


def test_a_shipped_model_equals_the_interpreter(shipped: Program) -> None:
    both = Both(tiny(shipped))
    for entry in shipped.entries:
        both.check(entry, [5, 2, 7], [3, 4, 1], [1, 1, 1], within=3e-5)
        both.check(entry, [3, 1], cached=False, within=3e-5)


def test_both_sides_of_every_branch_agree(shipped: Program) -> None:
    programs = [_always(tiny(shipped), limit) for limit in (0, 1 << 30)]
    assert programs[0].bodies != programs[1].bodies
    results = []
    for made in programs:
        both = Both(made)
        inputs = both.inputs("main", [6, 4])
        with torch.no_grad():
            results.append(both.emitted("main", Step([6, 4]), inputs))
    close(*results, within=3e-5)


def _always(made: Program, limit: int) -> Program:
    bodies = {}
    for name, graph in made.bodies.items():
        new = type(graph)(name)
        for node in graph:
            if node.op == "branch":
                node = node.with_(attrs={**node.attrs, "when": ("time", "<=", limit)})
            new.add(node)
        new.output = graph.output
        bodies[name] = new
    return made.with_bodies(bodies)


def test_only_wanted_rows_are_computed(shipped: Program) -> None:
    both = Both(tiny(shipped))
    inputs = both.inputs("main", [5, 2])
    with torch.no_grad():
        every = both.emitted("main", Step([5, 2]), inputs)
        last = both.emitted("main", Step([5, 2], last_only=True), inputs)
    close(last, every[[4, 6]])


def test_parameters_are_where_the_source_has_them(shipped: Program) -> None:
    scope: dict[str, object] = {}
    exec(emit(shipped), scope)
    model = scope["build"]()  # type: ignore[operator]
    paths = set(dict(model.named_parameters())) | set(dict(model.named_buffers()))
    assert attribute_path("layers[3].mlp.expert[5].W_gate") in paths
    assert "next.layer.mlp.bias" in paths
    assert model.layers[2].attn.W_dq.is_meta
    assert model.layers[2].attn.path == "layers.2.attn"


def test_gradients_equal_the_interpreters(shipped: Program) -> None:
    both = Both(tiny(shipped))
    counts = [4, 1, 3]
    inputs = both.inputs("main", counts)
    leaves = {k: v.requires_grad_() for k, v in both.weights.items()}
    wanted = torch.cat(both.expected("main", inputs))
    weight = torch.randn(wanted.shape)
    names = [n for n in leaves if both.owned(n).requires_grad]
    plain = torch.autograd.grad(
        (wanted * weight).sum(), [leaves[n] for n in names], allow_unused=True
    )
    got = (both.emitted("main", Step(counts), inputs) * weight).sum()
    ours = torch.autograd.grad(got, [both.owned(n) for n in names], allow_unused=True)
    assert sum(g is not None for g in ours) > 20
    for name, a, b in zip(names, ours, plain, strict=True):
        if b is None or not b.any():
            assert a is None or not a.any(), name
        else:
            assert a is not None, name
            close(a, b, within=1e-4)


def test_tables_are_computed_once(shipped: Program) -> None:
    both = Both(tiny(shipped))
    inputs = both.inputs("main", [2])
    with torch.inference_mode():
        both.emitted("main", Step([2]), inputs)
    (before,) = both.model._tables.values()  # type: ignore[union-attr]
    assert both.emitted("main", Step([2]), inputs).requires_grad  # no inference tensor was kept
    (after,) = both.model._tables.values()  # type: ignore[union-attr]
    assert before is after


def test_bf16_stays_near(shipped: Program) -> None:
    small = tiny(shipped)
    wide, narrow = Both(small), Both(small, dtype=torch.bfloat16)
    inputs = wide.inputs("main", [6, 2])
    with torch.no_grad():
        got = narrow.emitted("main", Step([6, 2]), inputs)
        wanted = wide.emitted("main", Step([6, 2]), inputs)
    assert got.dtype == torch.bfloat16
    difference = (got.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(difference.median()) < 0.1  # routing may flip for a token or two


def test_a_program_in_text_form_runs_after_every_pass() -> None:
    both = Both(tiny(decoder()))
    both.check("main", [5, 3], [1, 1])
    both.check("after", [5, 3], [1, 1])


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lambda", "class_", "train", "type", "path", "forward", "_x", "half_"]
)
def test_names_that_are_taken_get_an_underscore(name: str) -> None:
    assert attribute(name) == f"{name}_"
    assert identifier("lambda") == "lambda_"


def test_any_name_of_a_source_works() -> None:
    """Labels, parameters, inputs, dims and constants called as Python, torch and the text are."""
    sizes = {"torch": 3, "Tensor": 4, "step": 5, "class": 2}
    d, w, i = dim("self", "torch"), dim("W", "Tensor"), dim("import", "class")
    b = Body("M.call")
    x = b.input("step", t, d)
    torch_ = b.contract(b.param("train", w, d), x, over="self", name="torch")
    F = b.map("tanh", torch_, name="F")
    def_ = b.contract(b.param("W", d, w), F, over="W", name="def")
    like = b.map("mul", def_, b.param("lambda", d), name="like")
    named = b.map("mul", like, b.param("forward", i, d), name="lambda")
    both = Both(program(b.done(b.reduce("sum", named, "import", name="softmax")), sizes))
    both.check("main", [3, 1], [1, 2])


def test_equal_dims_of_other_names_are_kept_apart() -> None:
    a, b_, h = Dim("a", Extent.name("n")), Dim("b", Extent.name("n")), Dim("A", Extent.of(2))
    b = Body("M.call")
    x = b.input("x", t, a)
    y = b.map("mul", x, b.param("u", h, b_))
    both = Both(program(b.done(b.contract(y, b.param("W", a, b_, h), over="a b A")), {"n": 3}))
    both.check("main", [3, 1])


def test_a_block_of_two_sizes_is_one_class() -> None:
    made = decoder()
    again = replace(made, constants={**made.constants, "ffn": 50})
    classes = [re.findall(r"^class (\w+)", emit(p), re.MULTILINE) for p in (made, again)]
    assert classes[0] == classes[1]


# -- lines -----------------------------------------------------------------------------------------


def test_long_lines_break_between_arguments() -> None:
    line = f"x = function({', '.join(f'argument_{i}' for i in range(12))})"
    lines = wrapped(line, 8)
    assert lines[0] == "        x = function(" and lines[-1] == "        )"
    assert all(len(part) <= WIDTH for part in lines)
    assert wrapped("x = f(a)", 4) == ["    x = f(a)"]
    assert split('f(a, b), "c, d", [e, f]') == ["f(a, b)", '"c, d"', "[e, f]"]


def test_comments_wrap() -> None:
    lines = comment("word " * 40, "file.arch:1", 8)
    assert all(len(line) <= WIDTH for line in lines)
    assert lines[-1].endswith("  file.arch:1")
    assert comment("", "file.arch:1", 0) == ["# file.arch:1"]
    assert comment("x", "a\nb.arch:1", 0) == ["# x  a b.arch:1"]
    assert spoken('a\\"""b') == "a/'''b"
