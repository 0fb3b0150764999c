"""bfloat16: as near to float32 as transformers' own bfloat16, in every family.

Rounding changes which experts a token goes to, and then everything after it. So routers here are so
decided that routing is the same in both precisions, and DeepSeek-V3.2's indexer chooses all tokens.
"""

import pytest
import torch

import dslc
from oracle.reference import Reference
from test_zoo_dsv2 import FAMILY as DSV2
from test_zoo_dsv3_2 import FAMILY as DSV3_2
from test_zoo_llama3 import FAMILY as LLAMA3
from test_zoo_mixtral import FAMILY as MIXTRAL
from test_zoo_qwen2_5 import FAMILY as QWEN2_5
from test_zoo_qwen3_moe import FAMILY as QWEN3_MOE
from test_zoo_qwen3_next import FAMILY as QWEN3_NEXT

SEEDS = range(5)
TOKENS = torch.randint(97, (48,), generator=torch.Generator().manual_seed(0))


def picks(reference):
    """Which experts every router chooses for every token."""
    seen = []
    routers = [m for m in reference.model.modules() if hasattr(m, "top_k") and hasattr(m, "weight")]
    hooks = [
        router.register_forward_hook(lambda _, __, output: seen.append(output[-1].sort(-1)[0]))
        for router in routers
    ]
    reference.logits([TOKENS])
    for hook in hooks:
        hook.remove()
    return [chosen.tolist() for chosen in seen]


def distance(a, b):
    return float((a.detach().float() - b).norm() / b.norm())


@pytest.mark.parametrize(
    "family", [LLAMA3, QWEN2_5, MIXTRAL, QWEN3_MOE, QWEN3_NEXT, DSV2, DSV3_2], ids=lambda f: f.file
)
def test_error_is_at_most_a_fifth_above_transformers_own(tmp_path, family):
    compiled, ratios = str(tmp_path / "compiled"), []
    all_tokens = {"index_topk": len(TOKENS)} if family is DSV3_2 else {}
    for seed in SEEDS:
        path = family.write(
            tmp_path / str(seed),
            seed=seed,
            dtype=torch.bfloat16,
            constant_routing=True,
            **all_tokens,
        )
        if seed == 0:
            dslc.compile(family.file, checkpoint=str(path)).save(compiled)
        exact, rounded = Reference(path), Reference(path, torch.bfloat16)
        assert picks(exact) == picks(rounded)
        model = dslc.load(compiled, checkpoint=str(path), dtype="bfloat16")
        [truth], [theirs] = exact.logits([TOKENS]), rounded.logits([TOKENS])
        ratios.append(distance(model(TOKENS[None])[0], truth) / distance(theirs, truth))
    assert torch.tensor(ratios).median() <= 1.2, ratios
