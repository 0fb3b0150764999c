"""docs/language.md: every example in it is checked, and its models are compiled and run.

A fenced block marked ``arch`` is a file, ``arch equations`` stands in the def of ``SHORT``, ``arch
error`` gives the messages of the ``text`` block after it, ``arch future`` is not built yet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from compiler.interpret import CacheState, Interpreter, random_weights
from compiler.pipeline import compile_model
from dsl.program import check_file

DOC = Path(__file__).parents[2] / "docs" / "language.md"
PLACE = "    # the example stands here\n"  # in the file that short examples are part of
NOT_CAUSAL = {"Tagger"}  # every token sees those after it: one step only


@dataclass(frozen=True)
class Example:
    """A fenced block, and the ``text`` block that follows it."""

    line: int
    kind: str
    text: str
    shown: str

    @property
    def is_part(self) -> bool:
        """Equations, which stand in the def of SHORT."""
        return self.text.startswith(" ")

    def __str__(self) -> str:
        return f"line {self.line}"


def _examples() -> list[Example]:
    doc = DOC.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(
        r"^```arch *(\w*)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", doc, re.MULTILINE | re.DOTALL
    ):
        line = doc[: match.start()].count("\n") + 1
        found.append(Example(line, match[1], match[2], match[3] or ""))
    return found


EXAMPLES = _examples()
SHORT = next(e.text for e in EXAMPLES if PLACE in e.text)


def _messages(example: Example, folder: Path) -> str:
    text = SHORT.replace(PLACE, example.text) if example.is_part else example.text
    file = folder / "example.arch"
    file.write_text(text, encoding="utf-8")
    return "\n\n".join(d.render() for d in check_file(str(file)))


def _model(example: Example) -> str:
    match = re.search(r"^model (\w+)", example.text, re.MULTILINE)
    return match[1] if match else ""


def test_the_reader_finds_the_examples() -> None:
    kinds = [e.kind for e in EXAMPLES]
    assert set(kinds) == {"", "equations", "error", "future"}
    assert min(map(kinds.count, set(kinds))) >= 5
    assert sum(bool(_model(e)) for e in EXAMPLES) >= 8
    assert all(e.shown for e in EXAMPLES if e.kind == "error")


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.kind in ("", "equations")], ids=str)
def test_an_example_has_no_mistakes(example: Example, tmp_path: Path) -> None:
    assert _messages(example, tmp_path) == ""


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.kind == "error"], ids=str)
def test_a_mistake_gives_the_message_shown(example: Example, tmp_path: Path) -> None:
    found = _messages(example, tmp_path)
    for line in filter(None, example.shown.split("\n")):
        assert line in found, found


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.kind == "future"], ids=str)
def test_what_is_not_built_is_refused(example: Example, tmp_path: Path) -> None:
    assert _messages(example, tmp_path)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.kind == "" and _model(e)], ids=_model)
def test_a_model_runs_whole_and_in_steps(example: Example, tmp_path: Path) -> None:
    file = tmp_path / "example.arch"
    file.write_text(example.text, encoding="utf-8")
    program = compile_model(str(file)).program
    run = Interpreter(program, random_weights(program), torch.float64).run
    vocab = program.bodies[program.entries["main"].body].inputs[0].type.of
    assert vocab is not None
    tokens = torch.randint(0, vocab.size.at(program.sizes), (9,), generator=torch.manual_seed(0))
    for entry in program.entries:
        assert torch.isfinite(run(entry, {"token": tokens})).all()
    if _model(example) not in NOT_CAUSAL:
        state = CacheState()
        steps = [run("main", {"token": part}, state=state) for part in tokens.split([4, 3, 1, 1])]
        torch.testing.assert_close(torch.cat(steps), run("main", {"token": tokens}))
