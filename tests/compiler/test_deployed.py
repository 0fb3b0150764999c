"""A program compiled for a deployment: passes find it, and what no pass acts on is refused."""

import pytest

import dslc
from compiler.deployed import refuse_what_is_not_acted_on
from compiler.pipeline import STAGES, compile_model
from compiler.text import program_text
from dsl.constants import Choices

SMALL = Choices(preset="small")


def test_every_stage_carries_the_deployment():
    compiled = compile_model("dsv3", SMALL, deploy="ep2")
    for stage in STAGES:
        deployment = compiled.after(stage).deployment
        assert deployment is not None and deployment.name == "ep2" and deployment.mesh.size == 2
    assert compile_model("dsv3", SMALL).program.deployment is None


def test_what_asks_nothing_of_a_pass_is_changed_by_none(tmp_path):
    file = tmp_path / "alone.arch"
    file.write_text("edition 2026\nimport dsv3\ndeploy alone of DeepSeekV3 { mesh ep = 1 }\n")
    alone = compile_model(str(file), SMALL, deploy="alone").program
    assert program_text(alone) == program_text(compile_model(str(file), SMALL).program)
    refuse_what_is_not_acted_on(alone.deployment)


def test_what_is_not_acted_on_is_refused_where_a_program_would_be_emitted(tmp_path):
    file = tmp_path / "small.arch"
    file.write_text("import dsv3\ndeploy small of DeepSeekV3 { precision kv(bf16) for cached }\n")
    program = dslc.compile(file, dims="small", deploy="small")
    assert "body MoE.call" in program.graph()
    with pytest.raises(dslc.UserError) as raised:
        program.save(tmp_path / "out")
    assert str(raised.value) == (
        "the deployment 'small' asks for what is not built yet: precision 'kv' for cached "
        f"({file}:2); with --emit graph the stages up to there can be looked at"
    )
    assert not (tmp_path / "out").exists()


def test_all_that_a_deployment_asks_for_is_named_at_once():
    pretrain = dslc.compile("dsv3", deploy="pretrain").deployed
    with pytest.raises(dslc.UserError) as raised:
        refuse_what_is_not_acted_on(pretrain)
    for part in ("pipeline stages", "'dualpipe'", "training"):
        assert part in str(raised.value)
