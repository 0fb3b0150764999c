"""``require``: a config.json that would need other mathematics is refused."""

import pytest

from dsl.constants import Choices
from dsl.diagnostics import DiagnosticError
from dsl.program import open_program

NEEDS = """
require config layer_types = "full" | "window"
require config dense_layers = null
"""


def check(tmp_path, **config: object) -> None:
    file = tmp_path / "needs.arch"
    file.write_text(NEEDS)
    open_program(str(file), Choices(config=config))


@pytest.mark.parametrize("layers", [None, "full", [], ["full", "window", "full"]])
def test_a_list_holds_what_is_required(tmp_path, layers):
    check(tmp_path, layer_types=layers)


def test_an_item_that_is_something_else_is_named(tmp_path):
    with pytest.raises(
        DiagnosticError, match=r'layer_types has "linear", .* for "full" or "window"'
    ):
        check(tmp_path, layer_types=["full", "linear"])


def test_null_allows_an_empty_list_and_no_other(tmp_path):
    check(tmp_path, dense_layers=[])
    with pytest.raises(DiagnosticError, match=r"dense_layers has 0, .* for null"):
        check(tmp_path, dense_layers=[0, 3])
    with pytest.raises(DiagnosticError, match="dense_layers is 3"):
        check(tmp_path, dense_layers=3)


def test_an_expression_waits_for_a_checkpoint(tmp_path):
    """A file that has no sizes of its own is no mistake; what a checkpoint says is looked at."""
    file = tmp_path / "needs.arch"
    file.write_text("const heads = config heads\nrequire heads > 1\n")
    open_program(str(file))
    with pytest.raises(DiagnosticError, match="this does not hold: heads > 1"):
        open_program(str(file), Choices(config={"heads": 1}))
