"""Where constants come from: ``--set`` over config.json over a preset over the file's defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsl.constants import Choices
from dsl.diagnostics import DiagnosticError
from dsl.program import open_program

FILE = """
const layers = config num_hidden_layers, model.depth else 12
const hidden = config hidden_size
const heads  = config num_attention_heads else 4
const head   = hidden / heads
const theta  = config rope_scaling.rope_theta, rope_theta else 10000.0
const kind   = config rope_scaling.type else "default"
const rank   = config q_lora_rank else null

dims small default { hidden = 64, layers = 2 }
dims tiny of small { layers = 1, kind = "yarn" }
"""


@pytest.fixture
def value(tmp_path: Path) -> Any:
    """``value(name, choices...)``: what a constant is worth."""
    path = tmp_path / "main.arch"
    path.write_text(FILE, encoding="utf-8")

    def value(name: str, **choices: Any) -> Any:
        constants = open_program(str(path), Choices(**choices)).constants
        return constants.value(name, constants.declared[name].span)

    return value


@pytest.mark.parametrize(
    ("expected", "choices"),
    [
        (2, {}),  # the default preset
        (1, {"preset": "tiny"}),  # a preset over the one it builds on
        (7, {"config": {"num_hidden_layers": 7, "hidden_size": 8}, "preset": "tiny"}),
        (9, {"set": {"layers": 9}, "config": {"num_hidden_layers": 7, "hidden_size": 8}}),
        (9, {"set": {"num_hidden_layers": 9}, "preset": "tiny"}),  # by its key in config.json
        # With a config.json the default preset is out: it is the size of another checkpoint.
        (12, {"config": {"hidden_size": 8}}),
        (1, {"config": {"hidden_size": 8}, "preset": "tiny"}),  # but a chosen one is not
    ],
)
def test_precedence(value: Any, expected: int, choices: dict[str, Any]) -> None:
    assert value("layers", **choices) == expected


def test_a_preset_keeps_what_it_does_not_change(value: Any) -> None:
    assert value("hidden", preset="tiny") == 64
    assert value("kind", preset="tiny") == "yarn"
    assert value("kind", preset="small") == "default"


def test_derived_constants_follow(value: Any) -> None:
    assert value("head") == 16
    assert value("head", set={"heads": 2}) == 32
    assert value("head", set={"head": 5}) == 5


@pytest.mark.parametrize(
    ("expected", "config"),
    [
        (1.0, {"rope_scaling": {"rope_theta": 1.0}, "rope_theta": 2.0}),  # keys in their order
        (2.0, {"rope_scaling": {"type": "yarn"}, "rope_theta": 2.0}),
        (2.0, {"rope_scaling": None, "rope_theta": 2.0}),  # null is as good as absent
        (2.0, {"rope_scaling": {"rope_theta": None}, "rope_theta": 2.0}),
        (10000.0, {}),
    ],
)
def test_config_paths(value: Any, expected: float, config: dict[str, Any]) -> None:
    assert value("theta", config={"hidden_size": 8, **config}) == expected


def test_null_stays_null(value: Any) -> None:
    assert value("rank", config={"hidden_size": 8, "q_lora_rank": None}) is None
    assert value("rank", config={"hidden_size": 8, "q_lora_rank": 16}) == 16


# -- mistakes in what was chosen -------------------------------------------------------------------


def refused(path: Path, text: str, **choices: Any) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DiagnosticError) as raised:
        open_program(str(path), Choices(**choices))
    return str(raised.value).replace(str(path), "main.arch")


def test_an_unknown_name_is_told_what_is_near(tmp_path: Path) -> None:
    assert refused(tmp_path / "main.arch", FILE, set={"layer": 3}) == (
        "error[E0306]: --set layer: no constant or config key has this name\n"
        "  hint: did you mean 'layers'?"
    )
    assert refused(tmp_path / "main.arch", FILE, preset="tinny") == (
        "error[E0306]: no preset is called 'tinny'\n  hint: did you mean 'tiny'?"
    )
    assert refused(tmp_path / "main.arch", "const a = 1", preset="small") == (
        "error[E0306]: no preset is called 'small'\n  hint: the file has none"
    )


def test_a_key_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    assert refused(tmp_path / "main.arch", FILE, config={"num_hidden_layers": 3}) == (
        "error[E0301]: config.json has no hidden_size, which 'hidden' needs\n"
        "  --> main.arch:3:7\n"
        "  |\n"
        "3 | const hidden = config hidden_size\n"
        "  |       ^^^^^^\n"
        "  hint: --set hidden=... gives it a value"
    )


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ([1, 2], "a list"),
        ({"a": 1}, "a section"),
        (10**30, "too large a number"),
        (float("nan"), "nan"),
    ],
)
def test_a_value_that_no_constant_can_have(tmp_path: Path, given: object, what: str) -> None:
    assert refused(tmp_path / "main.arch", FILE, config={"hidden_size": given}) == (
        f"error[E0307]: config.json: hidden_size is {what}, not a number, text or truth value\n"
        "  --> main.arch:3:7\n"
        "  |\n"
        "3 | const hidden = config hidden_size\n"
        "  |       ^^^^^^"
    )


@pytest.mark.parametrize("given", ["yarn", [], 4, False])
def test_a_section_that_is_none(tmp_path: Path, given: object) -> None:
    """Taken for a checkpoint without the section, it would be run as another model."""
    text = "const factor = config rope_scaling.factor else null\n"
    assert refused(tmp_path / "main.arch", text, config={"rope_scaling": given}) == (
        "error[E0307]: config.json: rope_scaling is no section, and 'factor' is read from "
        "rope_scaling.factor\n"
        "  --> main.arch:1:7\n"
        "  |\n"
        "1 | const factor = config rope_scaling.factor else null\n"
        "  |       ^^^^^^"
    )


def test_a_requirement_names_what_the_checkpoint_says(tmp_path: Path) -> None:
    text = 'require config scoring_func = "sigmoid" | "sigmoid_v2"\n'
    assert refused(tmp_path / "main.arch", text, config={"scoring_func": "softmax"}) == (
        'error[E0305]: config.json: scoring_func is "softmax", '
        'and this model is written for "sigmoid" or "sigmoid_v2"\n'
        "  --> main.arch:1:1\n"
        "  |\n"
        '1 | require config scoring_func = "sigmoid" | "sigmoid_v2"\n'
        "  | ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^ required here"
    )


@pytest.mark.parametrize(
    ("allowed", "given", "holds"),
    [
        ("1", 1, True),
        ("1", 1.0, True),
        ("1", True, False),
        ("false", False, True),
        ("false", 0, False),
        ('"yarn"', "yarn", True),
        ("null", None, True),
        ("null", "yarn", False),
        ("-1", -1, True),
    ],
)
def test_what_a_requirement_accepts(
    tmp_path: Path, allowed: str, given: object, holds: bool
) -> None:
    path = tmp_path / "main.arch"
    text = f"require config key = {allowed}\n"
    if holds:
        path.write_text(text, encoding="utf-8")
        open_program(str(path), Choices(config={"key": given}))
    else:
        assert "error[E0305]: config.json: key is" in refused(path, text, config={"key": given})


def test_a_requirement_of_constants_shows_their_values(tmp_path: Path) -> None:
    text = "const heads = 4\nconst groups = 3\nrequire heads == groups * floor(heads / groups)\n"
    message = refused(tmp_path / "main.arch", text, set={"heads": 8})
    assert message.startswith("error[E0305]: this does not hold: heads == groups * floor(")
    assert message.endswith("heads is 8, groups is 3")


MODEL = """
const hidden = config hidden_size else 64
const heads = config num_attention_heads else 4
index t : time

block Head[d, h] {
  index e : size(d) / size(h)
  param W[e, d]
  def (x[d]) -> y[d] { y[d] = x[d] * sum[e](W[e,d]) }
}

model M {
  index d : hidden, h : heads
  use head = Head[d, h]
  def main(x[t,d]) -> y[t,d] { y[t,d] = head(x[t,d]) }
}
"""


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"heads": 3}, "index 'e' has no extent: hidden / heads is 64/3, not a whole number"),
        ({"heads": 0}, "index 'h' has extent 0 (heads)"),
        ({"hidden": -8}, "index 'd' has extent -8 (hidden)"),
        ({"hidden": 6.5}, "index 'd' has no extent: 'hidden' is 6.5, not a whole number"),
        ({"hidden": "64"}, "index 'd' has no extent: 'hidden' is '64', not a whole number"),
        ({"hidden": None}, "index 'd' has no extent: 'hidden' is null, not a whole number"),
        ({"hidden": True}, "index 'd' has no extent: 'hidden' is true, not a whole number"),
        ({"hidden": 2**40}, "index 'd' has extent 1099511627776 (hidden)"),
    ],
)
def test_extents_that_the_choices_make_impossible(
    tmp_path: Path, chosen: dict[str, Any], said: str
) -> None:
    assert f"error[E0304]: {said}\n" in refused(tmp_path / "main.arch", MODEL, set=chosen)
