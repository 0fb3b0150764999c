"""A plugin of pytest for ``make gpu``: tests that passed in a part that was stopped are not run
again in the next (``-p benchmarks.resume``; ``DSLC_PASSED`` names the file that lists them)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PASSED = "DSLC_PASSED"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = Path(os.environ[PASSED])
    passed = set(kept.read_text().splitlines()) if kept.exists() else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    done = report.when == "call" if report.passed else report.skipped
    if done:
        with Path(os.environ[PASSED]).open("a") as kept:
            kept.write(f"{report.nodeid}\n")
