"""``require``: a config.json that would need other mathematics is refused."""

import pytest

from dsl.constants import Choices
from dsl.diagnostics import DiagnosticError
from dsl.program import check_file, open_program
from dsl.requirements import limit_of

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


# -- how long a sequence may be -------------------------------------------------------------------

REACH = """
const most  = config max_position_embeddings else null
const table = 512
require history <= most
require history <= 2 * table
"""


def reach(tmp_path, text: str, **config: object) -> tuple[int, str] | None:
    file = tmp_path / "reach.arch"
    file.write_text(text)
    program = open_program(str(file), Choices(config=config or None))
    limit = limit_of(program.library, program.constants)
    return limit and (limit.positions, limit.span.text)


def test_the_least_of_all_limits_holds(tmp_path):
    shorter = reach(tmp_path, REACH, max_position_embeddings=77)
    assert shorter == (77, "require history <= most")
    longer = reach(tmp_path, REACH, max_position_embeddings=4096)
    assert longer == (1024, "require history <= 2 * table")
    assert reach(tmp_path, REACH) == (1024, "require history <= 2 * table")  # null is no limit
    assert reach(tmp_path, "const history = 5 require history <= 8") is None  # a constant


@pytest.mark.parametrize(
    ("scaling", "most"),
    [
        ({}, 64),  # plain: as config.json says
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0}, 256),  # trained at what config.json says
        ({"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4}, 64),
    ],
)
def test_a_stretched_rotary_embedding_reaches_further(tmp_path, scaling, most):
    config = {"max_position_embeddings": 64, "rope_scaling": scaling}
    limit = reach(tmp_path, "import std.rotary", **config)
    assert limit == (most, "require history <= context_length")


def test_a_config_that_names_no_length_sets_no_limit(tmp_path):
    assert reach(tmp_path, "import std.rotary") is None


def test_a_limit_may_wait_for_a_checkpoint(tmp_path):
    text = "const most = config max_position_embeddings\nrequire history <= most"
    assert reach(tmp_path, text) is None
    assert reach(tmp_path, text, max_position_embeddings=9) == (9, "require history <= most")


def test_a_key_that_several_constants_read_sets_all_that_would_read_it(tmp_path):
    file = tmp_path / "shared.arch"
    file.write_text("const size = config inner.width, width\nconst other = config width else 1")

    def sizes(**config: object) -> list:
        choices = Choices(set={"width": 99}, config=config)
        constants = open_program(str(file), choices).constants
        return [constants.value(n, None) for n in ("size", "other")]

    assert sizes() == [99, 99]
    assert sizes(inner={"width": 7}, width=8) == [7, 99]


# -- items of a list ------------------------------------------------------------------------------

IN_TURN = """
const every = config interval else 2
require config layer_types[i] = if floor((i + 1) / every) * every == i + 1 then "full" else "window"
"""


def test_items_are_what_their_numbers_say(tmp_path):
    file = tmp_path / "turns.arch"
    file.write_text(IN_TURN)

    def said(**config: object) -> str:
        try:
            open_program(str(file), Choices(config=config))
        except DiagnosticError as error:
            return str(error).splitlines()[0]
        return ""

    assert said() == said(layer_types=None) == said(layer_types=[]) == ""
    assert said(layer_types=["window", "full", "window"]) == ""
    assert said(layer_types=["window", "window", "full"], interval=3) == ""
    what = "error[E0305]: config.json: layer_types"
    assert said(layer_types=["full"] * 4) == (
        f'{what}[0] is "full", and this model is written for "window"'
    )
    assert said(layer_types=["window", "full", 3]) == (
        f'{what}[2] is 3, and this model is written for "window"'
    )
    assert said(layer_types="full") == (f'{what} is "full", and this model is written for a list')


def test_mistakes_in_what_items_must_be(tmp_path):
    file = tmp_path / "turns.arch"
    file.write_text("require config kinds[i] = if i < many then 1 else j\n")
    found = check_file(str(file))
    assert [d.message for d in found] == [
        "no constant is called 'many'",
        "no constant is called 'j'",
    ]
    file.write_text("const many = config many\nrequire config kinds[i] = i / many\n")
    assert not check_file(str(file))
    with pytest.raises(DiagnosticError, match=r"config\.json has no many, which 'many' needs"):
        open_program(str(file), Choices(config={"kinds": [1]}))
    with pytest.raises(DiagnosticError, match="E030"):
        open_program(str(file), Choices(config={"kinds": [1], "many": 0}))
