"""Plans beside what was published, with the signed error of each printed (pytest -s shows them).

Nothing in the rates is fitted to these: models/clusters.arch was written down first.
"""

import pytest

from compiler.planning.rates import Rates
from compiler.planning.routing import Router, spread
from compiler.planning.times import Sent, Times
from compiler.report import report
from tests.planning.planned import compiled, plan, subject

# arXiv:2412.19437 and 2505.09343: 15,360 sequences of 4,096 on 2,048 H800.
STEP, TOKENS_PER_DAY, HOURS = 19.926, 272.80e9, 180_000
PARTS = {
    "forward": 1.13,
    "bubble": 2.06,
    "backward": 1.99,
    "weight": 0.48,
    "pair": 13.95,
    "optimizer": 0.29,
}
SGLANG = {"sglang_prefill": 50_302, "sglang_decode": 22_282}  # tokens/s per H100 node, LMSYS, 2025


def error(name: str, found: float, published: float) -> float:
    signed = found / published - 1
    print(f"{name:<32} {found:14,.4g} published {published:12,.6g} error {signed:+.1%}")
    return signed


def test_the_published_training_step():
    data = plan("pretrain").as_data()
    time = data["time"]
    assert abs(error("step, s", time["step"], STEP)) < 0.20
    assert abs(error("GPU hours per trillion", data["gpu_hours_per_trillion_tokens"], HOURS)) < 0.20
    assert abs(error("tokens per day", data["tokens_per_day"], TOKENS_PER_DAY)) < 0.26
    for part, published in PARTS.items():
        error(part, time[part], published)
    assert sum(time[part] for part in PARTS) == pytest.approx(time["step"])
    assert data["fits"]


def test_the_training_step_counts_as_the_paper_does():
    """The paper's MFU from its own step, by the formula that plans use."""
    flops = report(compiled().after("elaborate")).training_flops
    assert 15_360 * 4_096 * flops / STEP / (2_048 * 989e12) == pytest.approx(0.3904, abs=0.0005)
    data = plan("pretrain").as_data()
    assert data["mfu"] == pytest.approx(0.3904 * STEP / data["time"]["step"], rel=0.002)
    assert data["dollars_per_trillion_tokens"] == 2 * data["gpu_hours_per_trillion_tokens"]


@pytest.mark.parametrize(("model", "published"), [("dsv3", 250e9), ("dsv2", 155e9)])
def test_the_published_flops_of_training(model, published):
    """arXiv:2505.09343, table 2: per token at 4,096, attention causal."""
    found = report(compiled(model).after("elaborate"), 4096).training_flops
    assert abs(error(f"{model}, training FLOPs per token", found, published)) < 0.005


@pytest.mark.parametrize("name", SGLANG)
def test_sglang_s_deployments(name):
    found = plan(name).as_data()["tokens_per_second_per_node"]
    error(name, found, SGLANG[name])
    assert SGLANG[name] / 1.6 < found < SGLANG[name] * 1.6


def test_an_attention_takes_what_the_profile_says():
    """1.237 ms for 4,096 causal tokens of 128 heads of 192/128: FLOPs are counted as they were."""
    from compiler.planning.training import Training

    about = subject("pretrain")
    training = Training(about)
    times = Times(about.rates(), about.sharding, about.precision, 4096)
    kernels = [k for b in training.model.blocks for k in b.kernels if k.kind == "attention"]
    assert times.of(kernels[0], False).forward == pytest.approx(1.237e-3, rel=0.01)


# -- limits of the network (arXiv:2505.09343, section 2.3.2) --


def token_limit(hidden: float, layers: int, bandwidth: float, copies: float, scales: float = 0.0):
    """Seconds per token of 32 tokens per device: FP8 out, BF16 back, both micro-batches' turns."""
    pair = 32 * copies * hidden * (1 + scales + 2) / bandwidth
    return 2 * pair * layers


@pytest.mark.parametrize(("bandwidth", "published"), [(50e9, 14.76e-3), (900e9, 0.82e-3)])
def test_the_published_limits_of_a_network(bandwidth, published):
    """From their stated inputs: hidden 7,000, 61 layers, 9 destinations, no scales."""
    assert token_limit(7_000, 61, bandwidth, 9) == pytest.approx(published, rel=0.002)
    model = token_limit(7_168, 58, bandwidth, 8, scales=4 / 128)
    print(
        f"{bandwidth / 1e9:.0f} GB/s: {published * 1e3} ms published,"
        f" {model * 1e3:.2f} ms of the model (58 layers of 7,168, 8 picks, scales)"
    )
    assert 0.7 < model / published < 1.1


def test_decoding_sends_what_the_limit_counts():
    """The planner's own transfers, at the raw rate and without latency, come to the same."""
    about = subject("decode")
    router = Router(288, 8, 8, 4)
    where = spread(router, about.sharding.nodes(("ep",)))
    rates = about.rates({("rate", "scale_out"): 50 / 40, ("rate", "scale_up"): 1.0})
    assert isinstance(rates, Rates)
    times = Times(rates, about.sharding, about.precision, 32, direct=True)
    out = 32 * where.picks_out * 7_168
    dispatch = times.transfer("send", Sent(out * (1 + 4 / 128), 0.0))
    combine = times.transfer("send", Sent(out * 2, 0.0))
    latency = 2 * rates.latency("send", "scale_out")
    per_layer = 2 * (dispatch + combine - latency)
    own_node = where.picks_out / 8  # what stays in a node is not sent
    assert per_layer * 58 == pytest.approx(token_limit(7_168, 58, 50e9, 8 * own_node, 4 / 128))
