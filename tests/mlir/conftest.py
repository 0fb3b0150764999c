"""What the workers of a test run share is removed by the last that ends: the controller."""

import shutil
import tempfile
from pathlib import Path

import pytest


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    run = getattr(session.config.option, "testrunuid", None)
    if run:
        shutil.rmtree(Path(tempfile.gettempdir()) / f"dslc-mlir-{run}", ignore_errors=True)
