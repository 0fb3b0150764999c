"""docs/deployments.md: its examples are checked, and it names all there is to name."""

import re
from pathlib import Path

import pytest

from dsl.clusters import COLLECTIVES, KERNELS, PLAIN
from dsl.deploy.clauses import DECODE, PREFILL, TRAIN
from dsl.deploy.stages import SCHEDULES
from dsl.formats import FIELDS
from dsl.program import check_file

DOC = (Path(__file__).parents[2] / "docs" / "deployments.md").read_text()


@pytest.mark.parametrize("example", re.findall(r"```arch\n(.*?)```", DOC, re.DOTALL))
def test_an_example_of_the_docs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.arch").write_text("import dsv3\n" + example)
    assert check_file("example.arch") == []


@pytest.mark.parametrize("name", [*KERNELS, *COLLECTIVES, *PLAIN, *FIELDS, *SCHEDULES])
def test_the_docs_name(name):
    assert f"`{name}`" in DOC


def test_the_docs_name_every_setting():
    for name in {*TRAIN, *PREFILL, *DECODE}:
        assert f"| `{name}" in DOC or f"`{name}`" in DOC
