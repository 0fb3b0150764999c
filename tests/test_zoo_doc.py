"""docs/zoo.md quotes equations that are there, and numbers that are so."""

import re
from pathlib import Path

import pytest

import dslc

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "zoo.md"


def tables():
    """Each table of the page: its rows, as lists of cells."""
    for block in re.findall(r"(?:^\|.*\n)+", DOC.read_text(), re.MULTILINE):
        head, _, *rows = [re.split(r"(?<!\\)\|", line.strip("|\n")) for line in block.splitlines()]
        yield [[cell.strip() for cell in row] for row in (head, *rows)]


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


SOURCE = squeezed(" ".join(p.read_text() for p in (ROOT / "dsl" / "std").glob("*.arch")))
SIDE_BY_SIDE = [rows for rows in tables() if rows[0][0] == "" and len(rows[0]) == 4]
NUMBERS = next(rows for rows in tables() if rows[0][0] == "model")[1:]
FILES = next(rows for rows in tables() if rows[0][0] == "file")[1:]


@pytest.mark.parametrize("rows", SIDE_BY_SIDE, ids=["routers", "attentions"])
def test_every_equation_is_one_of_the_library(rows):
    quoted = [e for row in rows[1:] for cell in row for e in re.findall(r"`([^`]*)`", cell)]
    equations = [e.replace("\\|", "|") for e in quoted if "=" in e]
    assert len(equations) > 12
    for equation in equations:
        assert squeezed(equation) in SOURCE, equation


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: row[0])
def test_numbers_are_what_inspect_says(row):
    model, preset = row[0].split()
    report = dslc.compile(model, dims=preset).report()
    counted = (report.parameters, report.activated, report.cache_bytes_per_token)
    assert [int(re.sub(r"\D", "", cell)) for cell in row[1:]] == list(counted)


def test_presets_are_those_of_the_files():
    told = {row[0].split("]")[0].strip("["): row for row in FILES}
    texts = {p.stem: p.read_text() for p in (ROOT / "models").glob("*.arch")}
    assert told.keys() == {name for name, text in texts.items() if "\nmodel " in text}
    for name, row in told.items():
        presets = re.findall(r"^dims (\S+)( of \S+)?( default)?", texts[name], re.MULTILINE)
        assert sorted(row[4].split(", ")) == sorted(p[0] for p in presets)
        assert [p[0] for p in presets if p[2]] == row[4].split(", ")[:1]
        assert row[1] in texts[name]


def test_links_lead_somewhere():
    prose = re.sub(r"`[^`]*`", "", DOC.read_text())
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        assert (DOC.parent / target).exists(), target
