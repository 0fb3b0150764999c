"""Clusters, number formats and the precision rules that use them."""

import pytest
from deploy_toy import program

from dsl.program import open_program


@pytest.fixture(scope="module")
def dsv3():
    return open_program("dsv3")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return program


def test_figures_of_a_cluster_are_those_of_its_device_and_its_own(dsv3):
    h800 = dsv3.clusters["h800"]
    assert (h800.kind, h800.device, h800.target) == ("gpu", "H800", "sm_90")
    assert h800.value("memory") == 80e9
    assert h800.value("peak", "scale_up") == 200e9  # over the H100's 450
    assert h800.value("peak", "scale_out") == 50e9  # written 400 Gb/s
    assert h800.value("rate", "gemm", "e4m3") < h800.value("peak", "e4m3")
    assert h800.value("rate", "gemm", "int8") is None
    assert "2022" in h800.figures["peak", "bf16"].source
    assert dsv3.clusters["gb200_nvl72"].size == 576


def test_every_shipped_figure_has_its_source(dsv3):
    for cluster in dsv3.clusters.values():
        assert all(figure.source for figure in cluster.figures.values())


def test_a_share_is_a_share_of_its_peak(toy):
    c = toy(
        """
device D {
  peak[memory] = 2 TB/s  "data sheet, 2024"
  rate[memory] = 85%     "measured, 2025"
  peak[e4m3]   = 1 PFLOPS "data sheet, 2024"
  gap          = 1.5 us  "measured, 2025"
}
cluster c { cpu = D, per_node = 1, nodes = 1 }
"""
    )
    cluster = c.clusters["c"]
    assert cluster.value("rate", "memory") == pytest.approx(1.7e12)
    assert cluster.value("gap") == pytest.approx(1.5e-6)
    assert cluster.of_format("peak", format=c.formats["mxfp8"]).value == 1e15
    assert cluster.of_format("peak", format=c.formats["bf16"]) is None


@pytest.mark.parametrize(
    ("name", "bits", "largest", "scale"),
    [
        ("f32", 32, 3.4028234663852886e38, None),
        ("bf16", 16, 3.3895313892515355e38, None),
        ("f16", 16, 65504, None),
        ("e4m3", 8, 448, "f32"),
        ("e5m2", 8, 57344, "f32"),
        ("ue8m0", 8, 2.0**127, None),
        ("e4m3_ue8m0", 8, 448, "ue8m0"),
        ("e2m1", 4, 6, "f32"),
        ("nvfp4", 4, 6, "e4m3"),
        ("int4", 4, 7, "bf16"),
    ],
)
def test_number_formats(dsv3, name, bits, largest, scale):
    format = dsv3.formats[name]
    assert (format.bits, format.largest) == (bits, largest)
    assert (format.scale.name if format.scale else None) == scale


def test_a_scale_may_be_scaled(dsv3):
    """NVFP4: an E4M3 scale for 16 elements, itself scaled in FP32 per tensor."""
    nvfp4 = dsv3.formats["nvfp4"]
    assert (str(nvfp4.tile), nvfp4.scale.name, nvfp4.scale.scale.name) == ("1 x 16", "e4m3", "f32")


def test_a_format_of_ones_own(toy):
    found = toy(
        """
format e3m4 { exponent = 3, fraction = 4, infinities = false, scale = ue8m0, rounding = up }
deploy a of Toy { precision own(e3m4, activations = 1 x all, weights = all x all) for Expert.up }
"""
    )
    (rule,) = found.deployments["a"].precision
    assert rule.roles["weights"].format.largest == 30  # 1.875 * 2^4
    assert (str(rule.roles["activations"].tile), rule.selects) == ("1 x all", "named")
    assert [str(t) for t in rule.targets] == ["Expert.up"]


@pytest.mark.parametrize(
    ("clause", "selects", "roles"),
    [
        ("bf16 for act", "act", {"values": "bf16"}),
        ("bf16", "act", {"values": "bf16"}),
        ("kv(e4m3, values = 1 x 128) for cached", "cached", {"values": "e4m3 1 x 128"}),
        ("mxfp8 for contractions", "contractions", dict.fromkeys("wag", "mxfp8 1 x 32")),
        (
            "w4(weights = int4) for Mixture.expert",
            "named",
            {"w": "int4 1 x 128", "a": "act", "g": "act"},
        ),
        (
            "w4a8(weights = int4, activations = e4m3 1 x 128)",
            "parameter",
            {"w": "int4 1 x 128", "a": "e4m3 1 x 128", "g": "e4m3 1 x 128"},
        ),
    ],
)
def test_what_a_precision_rule_says(toy, clause, selects, roles):
    (rule,) = toy(f"\ndeploy a of Toy {{ precision {clause} }}\n").deployments["a"].precision
    short = {"weights": "w", "activations": "a", "gradients": "g"}
    assert rule.selects == selects
    assert {short.get(name, name): str(stored) for name, stored in rule.roles.items()} == roles
