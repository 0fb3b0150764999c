"""Soft caps on scores and sinks in the softmax: attention as any other, and equal to transformers'.

Gemma 2 stands for the first, gpt-oss (``test_stacked.py``) for the second.
"""

from pathlib import Path

import pytest
from transformers import Gemma2Config

import dslc
from compiler.ir import Node
from compiler.pairs import most_pairs
from oracle.families import Family
from oracle.feeding import *  # noqa: F403

ORACLE = Path(__file__).parent / "oracle"
FAMILY = Family(
    str(ORACLE / "gemma2.arch"),
    Gemma2Config,
    {
        "hidden_size": 42,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "query_pre_attn_scalar": 14,
        "sliding_window": 5,
        "attn_implementation": "eager",  # transformers' other ones leave the caps out
    },
)
CAPS = {"attn_logit_softcapping": 0.7, "final_logit_softcapping": 20.0}
case = FAMILY.fixture(
    {
        "capped": {"form": "v5", **CAPS},
        "no caps": {"form": "v5", **dict.fromkeys(CAPS), "num_hidden_layers": 2},
    }
)


@pytest.mark.parametrize(
    ("file", "attribute"), [("gemma2.arch", "score"), ("gpt_oss.arch", "sink")]
)
def test_scores_of_all_pairs_are_never_formed(file: str, attribute: str) -> None:
    program = dslc.compile(ORACLE / file, dims="tiny", set={"layers": 2}).after()
    nodes: list[Node] = [node for body in program.bodies.values() for node in body]
    attentions = [node for node in nodes if node.op == "attention"]
    assert [node.attrs["mask"] for node in attentions] == [(0, 5), (0, None)]
    assert all(attribute in node.attrs for node in attentions)
    assert most_pairs(program) == 0


def test_what_the_mask_lets_see_is_counted() -> None:
    """A softmax that is written out is counted as one."""
    program = dslc.compile(ORACLE / "gpt_oss.arch", set={"window": 2**20})
    # Of all queries of a sequence: twice as many positions, twice a score and a value each.
    long, short = (length * program.report(length).forward_flops for length in (8192, 4096))
    heads, width, layers = 64, 64, 24
    pairs = 8192 * 8193 / 2 - 2 * 4096 * 4097 / 2
    assert long - 2 * short == pytest.approx(4 * heads * width * layers * pairs)
