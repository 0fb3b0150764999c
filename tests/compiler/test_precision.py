"""Which tensors a precision rule speaks of."""

import pytest

import dslc
from compiler.precision import weights_of
from compiler.tensors import patterns

RULES = {
    "contractions with a parameter, except embed, head, centroid, W_eh": {
        "attn.W_dq", "attn.W_uq", "attn.W_dkv", "attn.W_ukv", "attn.W_o",
        "mlp.W_gate", "mlp.W_up", "mlp.W_down",
        "expert.W_gate", "expert.W_up", "expert.W_down",
        "shared.W_gate", "shared.W_up", "shared.W_down",
    },
    "contractions with a parameter, except MLA, MoE, NextToken": {
        "mlp.W_gate", "mlp.W_up", "mlp.W_down", "head",
    },
    "contractions with a parameter, except Dense.attn, Sparse.attn, Dense.mlp, shared, expert": {
        "head", "next.W_eh", "mlp.centroid",
    },
    "MoE.expert, MLA.W_o": {"expert.W_gate", "expert.W_up", "expert.W_down", "attn.W_o"},
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_speaks_of(tmp_path, rule):
    (tmp_path / "rules.arch").write_text(
        "edition 2026\nimport dsv3\ndeploy rules of DeepSeekV3 {\n"
        f"  precision fp8(e4m3, activations = 1 x 128, weights = 128 x 128) for {rule}\n}}\n"
    )
    program = dslc.compile(tmp_path / "rules.arch", dims="small")
    [found] = program.deployment("rules").precision
    before = program.after("elaborate")
    chosen = weights_of(before, found)
    names = set()
    for pattern in patterns(before):
        if (pattern.path, pattern.ranges) in chosen:
            parts = [part.partition("[")[0] for part in pattern.path.split(".")]
            names.add(".".join(parts[-2:]))
    assert names == RULES[rule]
