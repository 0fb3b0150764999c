"""Presets are named as people name models: by size."""

import pytest

from dsl.constants import Choices
from dsl.diagnostics import DiagnosticError
from dsl.program import open_program

PRESETS = """
const width = config hidden_size
dims 8B default { width = 8 }
dims 0.5B { width = 5 }
dims 8x7B of 8B { width = 56 }
dims 30B-A3B of 8x7B { }
dims small of 0.5B { width = 1 }
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "presets.arch"
    path.write_text(PRESETS)
    return path


@pytest.mark.parametrize(
    ("preset", "width"),
    [(None, 8), ("8B", 8), ("0.5B", 5), ("8x7B", 56), ("30B-A3B", 56), ("small", 1)],
)
def test_a_size_is_a_name(file, preset, width):
    program = open_program(str(file), Choices(preset=preset))
    assert program.constants.value("width", program.library.root.file.span) == width


def test_an_unknown_size_is_told_the_known_ones(file):
    with pytest.raises(DiagnosticError, match=r"no preset is called '30B-A4B'[^?]*'30B-A3B'"):
        open_program(str(file), Choices(preset="30B-A4B"))


def test_a_number_alone_is_no_name(file):
    file.write_text("dims 8 { width = 3 }\n")
    with pytest.raises(DiagnosticError, match="expected a name, or a size such as 8B"):
        open_program(str(file))
