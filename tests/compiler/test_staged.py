"""A training deployment as text: its stages, and each rank's turns."""

import re
import time

import pytest

import dslc
from compiler.errors import UserError
from dslc.commands.run import refuse_stages


def test_pretraining_compiles_to_text_and_is_not_run(tmp_path):
    begun = time.process_time()
    dslc.compile("dsv3").save(tmp_path / "plain")
    plain = time.process_time() - begun
    begun = time.process_time()
    dslc.compile("dsv3", deploy="pretrain").save(tmp_path / "pretrain")
    assert time.process_time() - begun < plain + 1.0
    text = (tmp_path / "pretrain" / "stages.txt").read_text()
    assert text.startswith(
        "deployment pretrain of DeepSeekV3\nmesh pp = 16, dp = 2, ep = 64\nbatch over dp, ep\n\n"
        "stage 0 on pp 0, and in the other direction on pp 15\n"
        "  what comes before the layers\n  layers[0..3]: Dense.call\n  layers[3..4]: Sparse.call\n"
    )
    assert "  layers[60..61]: Sparse.call\n  what comes after the layers\n  mtp\n" in text
    turns = [line.split(": ")[1] for line in text.splitlines() if re.match(r"pp \d+: ", line)]
    assert len(turns) == 16
    for rank in turns:  # each micro-batch once forward and once backward, from either end
        assert len(re.findall(r"F\d\.\d+", rank)) == 120
        assert len(re.findall(r"B\d\.\d+", rank)) + len(re.findall(r"I\d\.\d+", rank)) == 120
    graph = (tmp_path / "pretrain" / "graph.txt").read_text()
    assert "%routed.rows" not in graph and "= routing(" in graph and "per_node=8" in graph
    with pytest.raises(UserError) as raised:
        refuse_stages(tmp_path / "pretrain")
    assert str(raised.value) == (
        f"{tmp_path / 'pretrain'} holds the stages of deployment 'pretrain' as text; training and "
        "pipelines are not run yet"
    )
