"""Models that are hard on a compiler, hand-written and random: however they are computed, the same.

``differential.py`` says which ways there are. Hand-written ones also equal their meaning in plain
torch, which no code of this project computes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings

from compiler.equivalence import difference
from compiler.interpret import Interpreter, random_weights
from dsl.diagnostics import DiagnosticError
from tests.differential import agree, compiled
from tests.generated import models
from tests.nasty import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_a_nasty_model_means_what_it_says(name: str, tmp_path: Path) -> None:
    program = compiled(tmp_path, MODELS[name].text).after("elaborate")
    weights = random_weights(program, 1, torch.float64)
    interpreter = Interpreter(program, weights, torch.float64)
    token = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    for entry, reference in MODELS[name].references.items():
        for count in (7, 3):
            found = interpreter.run(entry, {"token": token[:count]})
            assert difference(found, reference(weights, token[:count])) < 1e-12, entry


@pytest.mark.parametrize("name", MODELS)
def test_a_nasty_model_computes_the_same_however_it_is_run(name: str, tmp_path: Path) -> None:
    agree(tmp_path, MODELS[name].text)


@settings(
    max_examples=6, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(models())
def test_a_random_model_computes_the_same_however_it_is_run(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    try:
        agree(tmp_path_factory.mktemp("random"), text)
    except DiagnosticError:
        reject()  # the generator knows the language's rules nearly
