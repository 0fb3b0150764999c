"""The shipped models through every pass: well-formed, printed and read back, and still the same."""

from functools import cache
from pathlib import Path

import pytest

from compiler.equivalence import equivalent
from compiler.ir import Program
from compiler.pipeline import STAGES, compile_model
from compiler.text import parse, program_text, same
from compiler.verify import problems
from dsl.constants import Choices

MODELS = [
    file
    for file in sorted((Path(__file__).parents[2] / "models").glob("*.arch"))
    if "\nmodel " in file.read_text()
]


@cache
def stages(model: Path, layers: int | None = None) -> dict[str, Program]:
    choices = Choices(set={"layers": layers}) if layers else Choices()
    return compile_model(str(model), choices).stages


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_a_model_survives_every_pass(model: Path, stage: str) -> None:
    program = stages(model)[stage]
    assert not problems(program)
    text = program_text(program)
    assert same(parse(text), program)
    assert program_text(parse(text)) == text
    equivalent(stages(model)["elaborate"], program)


@pytest.mark.parametrize("stage", STAGES)
def test_more_layers_change_one_line(stage: str) -> None:
    (model,) = (m for m in MODELS if m.stem == "dsv3")
    few, many = (program_text(stages(model, n)[stage]).split("\n") for n in (61, 610))
    assert [line for line in many if line not in few] == ["const layers = 610"]
    assert len(few) == len(many)
