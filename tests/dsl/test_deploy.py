"""Deployments as the compiler reads them: the published ones, inheritance, sizes."""

import json

import pytest
from deploy_toy import program

from dsl.constants import Choices
from dsl.deploy.check import choose
from dsl.deploy.show import cluster_rows, describe, describe_cluster, describe_format, rows
from dsl.diagnostics import DiagnosticError
from dsl.program import check_file, open_program


@pytest.fixture(scope="module")
def dsv3():
    return open_program("dsv3")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return program


# -- DeepSeek-V3 -----------------------------------------------------------------------------------


def test_the_deployments_that_users_rely_on(dsv3):
    published = "fp8 pretrain prefill decode sglang_prefill sglang_decode".split()
    local = "ep2 ep4 dp2ep2 tp2ep2 dp2tp2ep2".split()
    assert list(dsv3.deployments) == published + local
    assert not any(d.problems for d in dsv3.deployments.values())


def test_pretraining_as_published(dsv3):
    pretrain = choose(dsv3, "pretrain")
    assert (pretrain.mesh.size, pretrain.cluster.size) == (2048, 2048)
    assert pretrain.mesh.nodes_spanned("ep", pretrain.cluster.per_node) == 8
    assert [pretrain.mesh.stride(axis) for axis in ("pp", "dp", "ep")] == [128, 64, 1]
    assert pretrain.micro_batches == 120
    assert pretrain.batch_axes == ("dp", "ep")
    stages = pretrain.stages.stages
    assert [s.layers for s in stages[:2]] == [(("layers", 0, 4),), (("layers", 4, 8),)]
    assert (len(stages), stages[-1].layers, stages[-1].extras) == (
        16,
        (("layers", 60, 61),),
        ("mtp",),
    )
    assert pretrain.overlap.schedule == "dualpipe"
    assert pretrain.train.moments is dsv3.formats["bf16"]
    assert pretrain.train.weight == {"mtp": 0.3}
    optimizer = pretrain.shard[-1]
    assert (optimizer.target.kind, optimizer.replicas) == ("optimizer", True)


@pytest.mark.parametrize(
    ("name", "ranks", "each"),
    [("pretrain", 2048, 4), ("prefill", 32, 9), ("decode", 144, 2), ("sglang_decode", 72, 4)],
)
def test_routed_experts_per_rank(dsv3, name, ranks, each):
    deployment = choose(dsv3, name)
    (experts,) = [r for r in deployment.shard if str(r.target) == "MoE.expert"]
    assert deployment.mesh.size == ranks
    assert [s.each for s in experts.splits] == [each]


def test_the_recipe_is_one_rule(dsv3):
    (rule,) = choose(dsv3, "fp8").precision
    assert {name: str(stored) for name, stored in rule.roles.items()} == {
        "weights": "e4m3 128 x 128",
        "activations": "e4m3 1 x 128",
        "gradients": "e4m3 1 x 128",
    }
    assert (rule.selects, rule.promote) == ("parameter", 128)
    assert [str(t) for t in rule.exceptions] == [
        "DeepSeekV3.embed",
        "DeepSeekV3.head",
        "MoE.centroid",
        "NextToken.W_eh",
    ]
    assert choose(dsv3, "decode").precision == (rule,)


def test_an_index_goes_where_it_is_passed(dsv3):
    splits = {str(r.target): r.splits for r in choose(dsv3, "tp2ep2").shard}
    assert [(s.block, s.name, s.each) for s in splits["MoE.f"]] == [("MoE", "f", 1024)]
    assert [(s.block, s.name, s.each) for s in splits["vocab"]] == [("DeepSeekV3", "w", 64640)]


def test_a_preset_too_small_for_a_deployment_compiles_without_it():
    small = open_program("dsv3", Choices(preset="small"))
    assert choose(small, "dp2tp2ep2").problems == ()
    with pytest.raises(DiagnosticError, match=r"'MoE\.expert' has 16 entries, which 64 ranks"):
        choose(small, "pretrain")


def test_an_unknown_deployment(dsv3):
    with pytest.raises(DiagnosticError, match=r"(?s)no deployment .* 'prefil'.*'prefill'\?"):
        choose(dsv3, "prefil")


def test_what_inspect_shows(dsv3):
    for deployment in dsv3.deployments.values():
        assert json.loads(json.dumps(describe(deployment)))["ranks"] == deployment.mesh.size
    shown = rows(dsv3.deployments["pretrain"])
    assert ("mesh", "pp 16 x dp 2 x ep 64", "2,048 ranks") in shown
    assert ("stages", "pp: 4 x 15, 1 layers", "mtp with stage 15") in shown
    assert ("shard", "MoE.expert over ep", "MoE.expert: 256 = 64 x 4") in shown
    assert ("", "weights e4m3 128 x 128", "8 bits to 448, f32 scales") in shown
    assert ("", "120 micro-batches per rank", "") in shown
    decode = rows(dsv3.deployments["decode"])
    assert any(row[:2] == ("serve decode", "tpot 50 ms") for row in decode)
    for cluster in dsv3.clusters.values():
        json.dumps(describe_cluster(cluster))
        assert cluster_rows(cluster)[0][0] == "devices"
    for format in dsv3.formats.values():
        json.dumps(describe_format(format))


# -- inheritance -----------------------------------------------------------------------------------

BASE = """
deploy base of Toy {
  mesh      dp = 2, ep = 3
  shard     batch -> (dp, ep), Mixture.expert -> ep
  precision mx(mxfp8)
  precision bf16 for act
  train     batch = 12, sequence = 8, weight[main] = 2
}
"""


def test_rules_and_settings_are_replaced_one_by_one(toy):
    found = toy(
        BASE
        + """
deploy next from base {
  mesh  dp = 2, ep = 2, tp = 2
  shard heads -> tp, Mixture.expert -> (), Mixture.f -> ep, batch -> dp
  train micro_batch = 3
}
"""
    )
    base, following = found.deployments.values()
    assert [str(r.target) for r in following.shard] == [
        "batch",
        "Mixture.expert",
        "heads",
        "Mixture.f",
    ]
    assert [r.axes for r in following.shard] == [("dp",), (), ("tp",), ("ep",)]
    assert following.precision == base.precision
    assert (following.train.batch, following.train.weight) == (12, {"main": 2})
    assert (base.micro_batches, following.micro_batches) == (2, 2)
    assert following.bases == ("base",)


def test_precision_is_replaced_as_a_whole_and_serving_replaces_training(toy):
    found = toy(
        BASE
        + """
deploy bare from base { precision none }
deploy served from base {
  precision int8w(weights = int8 1 x all)
  serve     decode context = 9, batch_per_rank = 2
}
"""
    )
    assert found.deployments["bare"].precision == ()
    served = found.deployments["served"]
    assert (served.train, served.serve.batch_per_rank) == (None, 2)
    assert [r.label for r in served.precision] == ["int8w"]


def test_a_file_may_give_a_deployment_that_it_imports_another_meaning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.arch").write_text(
        """
import dsv3
cluster h800 { gpu = H800, per_node = 8, nodes = 8 }
deploy decode of DeepSeekV3 from decode { mesh ep = 36 }
deploy pretrain of DeepSeekV3 from pretrain on h800 { }
"""
    )
    mine = open_program("mine.arch")
    assert mine.name == "DeepSeekV3"
    decode = choose(mine, "decode")
    assert (decode.mesh.size, decode.bases) == (36, ("decode", "prefill", "fp8"))
    with pytest.raises(DiagnosticError, match="2,048 ranks, and cluster 'h800' has 64 devices"):
        choose(mine, "pretrain")
    assert {d.code for d in check_file("mine.arch")} == {"E0816"}


def test_the_design_s_example(tmp_path, monkeypatch):
    """As it stands in the language's first description."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.arch").write_text(
        """
import dsv3
cluster h800 { gpu = H800, per_node = 8, nodes = 256 }                    # peaks, ...

deploy pretrain of DeepSeekV3 on h800 {
  mesh      pp = 16, dp = 2, ep = 64
  stages    pp : layers 0 .. 61 as (4 x 15, 1), mtp with the last          # explicit
  shard     batch -> (dp, ep), MoE.expert -> ep, optimizer -> replicas
  precision fp8(e4m3, activations = 1 x 128, weights = 128 x 128, promote = 128)
            for contractions with a parameter, except embed, head, centroid
  overlap   dualpipe
  train     batch = 15360, sequence = 4096, micro_batch = 1
}
"""
    )
    assert check_file("example.arch") == []


# -- sizes -----------------------------------------------------------------------------------------

SIZED = """
index t : time
const width = config hidden_size
const heads = config num_heads
block Mix[d] {
  index h : heads
  param W[d, h]
  def (x[t,d]) -> y[t,d] {
    y[t,d] = W[d,h] * sum[d](x[t,d]) * W[d,h]
  }
}
model Sized {
  index d : width, w : 7
  param embed[w, d]
  def main(token[t] of w) -> logits[t,w] {
    x[t,d]      = embed[token[t], d]
    logits[t,w] = embed[w,d] * x[t,d]
  }
}
deploy a of Sized {
  mesh  tp = width / 4
  shard width -> tp
}
"""


def test_sizes_that_come_with_a_checkpoint_are_judged_then(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sized.arch").write_text(SIZED)
    assert check_file("sized.arch") == []
    sized = open_program("sized.arch", Choices(config={"hidden_size": 8, "num_heads": 2}))
    assert choose(sized, "a").mesh.sizes == {"tp": 2}
    odd = open_program("sized.arch", Choices(config={"hidden_size": 10, "num_heads": 2}))
    with pytest.raises(DiagnosticError, match="'tp' must be a whole number"):
        choose(odd, "a")


def test_copies_fill_up_the_ranks(toy):
    text = "\ndeploy a of Toy { mesh ep = 4 shard Mixture.expert -> ep with 2 redundant }\n"
    (split,) = choose(toy(text), "a").shard[0].splits
    assert (split.extent, split.redundant, split.ways, split.each) == (6, 2, 4, 2)


def test_what_lies_on_an_axis_of_one_is_no_conflict(toy):
    text = "\ndeploy a of Toy { mesh tp = 1 shard Attention.h -> tp, width -> tp }\n"
    assert choose(toy(text), "a").problems == ()


def test_experts_that_tokens_were_sent_to_may_be_split_along_another_axis(toy):
    """Inside an expert, tokens are no longer spread over ep: they were sent to its rank."""
    text = """
deploy a of Toy {
  mesh  ep = 2, tp = 2
  shard batch -> ep, Mixture.expert -> ep, Mixture.f -> tp, heads -> tp
}
"""
    assert choose(toy(text), "a").problems == ()


def test_a_pipeline_without_a_word_about_its_schedule_runs_1f1b(toy):
    text = """
deploy a of Toy {
  mesh   pp = 5
  stages pp : layers, main with the last
  train  batch = 4, sequence = 8
}
"""
    a = choose(toy(text), "a")
    assert a.overlap.schedule == "1f1b"
    assert [s.layers[0][1:] for s in a.stages.stages] == [(i, i + 1) for i in range(5)]


def test_interleaved_stages(toy):
    text = """
deploy a of Toy {
  mesh    pp = 2
  stages  pp : layers 0 .. 2 as (1 x 2), layers 2 .. 5 as (2, 1)
  overlap 1f1b
  train   batch = 4, sequence = 8
}
"""
    assert len(choose(toy(text, depth=5), "a").stages.stages) == 4
