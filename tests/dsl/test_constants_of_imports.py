"""A constant that several files of a program declare."""

import pytest

from dsl.diagnostics import DiagnosticError
from dsl.program import open_program

WIDTH = "const width = config moe_width, width else 3\n"
OTHER = "const width = config width else 5\n"


@pytest.fixture
def width(tmp_path):
    """What `width` is in a program of these files, the last of them opened."""

    def width(**files: str) -> object:
        for name, text in files.items():
            (tmp_path / f"{name}.arch").write_text(text)
        program = open_program(str(tmp_path / f"{name}.arch"))
        return program.constants.value("width", program.library.root.file.span)

    return width


def test_a_file_may_give_what_it_imports_another_meaning(width):
    assert width(library=WIDTH, net="import library\n" + OTHER) == 5


def test_that_meaning_holds_for_those_who_import_the_file(width):
    """As where a deployment imports a model that imports the standard library."""
    assert width(library=WIDTH, net="import library\n" + OTHER, deploy="import net\n") == 5
    assert (
        width(library=WIDTH, net="import library\n" + OTHER, deploy="import library import net")
        == 5
    )


def test_files_that_do_not_know_each_other_agree_or_are_refused(width):
    with pytest.raises(DiagnosticError, match="'width' is declared twice"):
        width(one=WIDTH, two=OTHER, net="import one\nimport two\n")
    assert width(one=WIDTH, two=WIDTH.replace(" = ", "  =   "), net="import one import two") == 3


def test_a_file_that_imports_both_says_which_is_meant(width):
    files = {"one": WIDTH, "two": OTHER}
    assert width(**files, net="import one\nimport two\nconst width = 7\n") == 7


def test_twice_in_one_file_is_a_mistake(width):
    with pytest.raises(DiagnosticError, match="'width' is declared twice"):
        width(net=WIDTH + WIDTH)
