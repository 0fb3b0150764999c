"""docs/python.md: its examples run, in order, and mean what their comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the page's examples define."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    found: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), found)
    return found


def test_shapes(names):
    assert names["logits"].shape == (2, 5, 1024)
    assert names["last"].shape == (2, 1, 1024)
    assert names["ahead"].shape == (2, 4, 1024)
    assert not names["logits"][1, 3:].any()


def test_a_prompt_in_chunks_is_the_prompt(names):
    torch.testing.assert_close(names["first"][0], names["logits"][0, :3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(names["second"][0], names["logits"][0, 3:], rtol=1e-4, atol=1e-4)


def test_results_have_no_padding(names):
    assert [len(s) for s in names["out"]] == [9, 7]
    assert names["whole"].shape == (2, 9)


def test_a_cache_that_is_kept_changes_nothing(names):
    model, cache = names["model"], names["model"].new_cache(1)
    assert names["answer"].equal(model.generate(names["question"], cache=cache))
    assert names["begun"].shape == (1, 37) and names["drawn"].shape == (2, 37)


def test_the_error_on_the_page_is_the_one_that_is_raised(names):
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks == [names["said"] + "\n"]


def test_inside(names):
    assert names["values"]["layers[3].h"].shape == (2, 5, 256)
    assert "branch" in names["text"] and "class MLA" in names["code"]
