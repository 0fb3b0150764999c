"""The oracle's own oracle: the graph, interpreted, computes what transformers computes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from compiler.interpret import CacheState, Interpreter
from compiler.pipeline import STAGES, compile_model
from compiler.tensors import tensors
from dsl.constants import Choices
from oracle.cases import checkpoint, prompts, reference
from oracle.compare import assert_equal


@pytest.mark.parametrize("case", ["plain", "yarn_v5"])
def test_the_graph_means_what_transformers_computes(case: str) -> None:
    folder = checkpoint(case)
    stored = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    config = json.loads((folder / "config.json").read_text())
    stages = compile_model("dsv3", Choices(config=config)).stages
    tokens = prompts(case)[0]
    wanted, later = reference(case).logits([tokens])[0], reference(case).mtp_logits([tokens])[0]
    for stage in (STAGES[0], STAGES[-1]):
        program = stages[stage]
        weights = {t.path: stored[t.name] for t in tensors(program)}
        interpreter = Interpreter(program, weights)
        assert_equal(interpreter.run("main", {"token": tokens}), wanted, stage)
        assert_equal(interpreter.run("mtp", {"token": tokens}), later, f"{stage}, mtp")
        state = CacheState()
        chunks = tokens.split([12, *[1] * 3, len(tokens) - 15])
        steps = [interpreter.run("main", {"token": c}, state=state) for c in chunks]
        assert_equal(torch.cat(steps), wanted, f"{stage}, in chunks")
