"""docs/errors.md explains every code, and its examples are answered as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mistakes import inside

from dsl.program import check_file

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
CODE = re.compile(r'"([EW]0[0-9]{3})"')
SECTION = re.compile(r"^## ([EW]0\d{3}): ([^\n]+)\n(.*?)(?=^#|\Z)", re.MULTILINE | re.DOTALL)
SECTIONS = {code: body for code, _, body in SECTION.findall(TEXT)}
EXAMPLES = {
    code: blocks
    for code, body in SECTIONS.items()
    if (blocks := re.findall(r"^```arch\n(.*?)^```", body, re.MULTILINE | re.DOTALL))
}


def codes(text: str, folder: Path) -> set[str]:
    (folder / "main.arch").write_text(text, encoding="utf-8")
    with inside(folder):
        return {d.code for d in check_file("main.arch", warnings=True)}


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_is_answered_with_its_code_and_mended(code: str, tmp_path: Path) -> None:
    wrong, mended = EXAMPLES[code]
    assert codes(wrong, tmp_path) == {code}
    assert codes(mended, tmp_path) == set()


def test_every_code_is_explained_and_every_explained_code_is_used() -> None:
    used = {
        c for path in (ROOT / "dsl").rglob("*.py") for c in CODE.findall(path.read_text("utf-8"))
    }
    explained = set(SECTIONS) | set(re.findall(r"^\| (E08\d{2}) \|", TEXT, re.MULTILINE))
    assert explained == used


def test_codes_are_listed_in_order_once() -> None:
    listed = [code for code, _, _ in SECTION.findall(TEXT)]
    assert listed == sorted(set(listed), key=lambda code: code[1:])


def test_most_codes_have_an_example() -> None:
    """The others need a second file, a broken one, or a checkpoint."""
    assert set(SECTIONS) - set(EXAMPLES) == {"E0103", "E0105", "E0202", "E0307", "E0410"}


def test_the_links_of_the_table_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
