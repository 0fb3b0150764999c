"""Shipped models on meshes: what divides them in tensors, blocks and sequences."""

from pathlib import Path

import torch

import dslc
from dslc.program import compile_file

# Sizes that no mesh axis beside the divided ones has, several of them odd.
TINY = {
    "llama3": {"hidden": 24, "vocab": 54, "layers": 2, "ffn": 27, "heads": 6, "kv_heads": 3},
    "qwen2_5": {"hidden": 24, "vocab": 54, "layers": 2, "ffn": 27, "heads": 8, "kv_heads": 2,
                "head_dim": 6},
    "mixtral": {"hidden": 24, "vocab": 51, "layers": 2, "expert_ffn": 10, "heads": 8,
                "kv_heads": 2, "head_dim": 6, "experts": 6, "per_token": 2, "window": 5},
    "qwen3_moe": {"hidden": 20, "vocab": 51, "layers": 2, "expert_ffn": 9, "heads": 4,
                  "kv_heads": 2, "head_dim": 6, "experts": 9, "per_token": 4},
    "qwen3_next": {"hidden": 20, "vocab": 51, "layers": 4, "heads": 4, "kv_heads": 2,
                   "head_dim": 8, "key_heads": 2, "value_heads": 4, "key_width": 5,
                   "value_width": 6, "experts": 6, "per_token": 3, "expert_ffn": 9,
                   "shared_ffn": 10},
    "dsv3_2": {"hidden": 20, "vocab": 51, "layers": 2, "dense": 1, "ffn": 27, "heads": 4,
               "q_rank": 9, "kv_rank": 7, "nope": 5, "rope": 4, "value": 6, "experts": 8,
               "groups": 4, "open_groups": 2, "per_token": 3, "expert_ffn": 9, "index_heads": 2,
               "index_width": 8, "index_topk": 4},
    "dsv3": {"hidden": 20, "vocab": 51, "layers": 2, "dense": 1, "ffn": 27, "heads": 3,
             "q_rank": 9, "kv_rank": 7, "nope": 5, "rope": 4, "value": 6, "experts": 9,
             "groups": 3, "open_groups": 2, "per_token": 3, "expert_ffn": 9},
}  # fmt: skip
# By a name: the model's file, its ranks, and the deployment.
DEPLOYMENTS = {
    "llama_tp3": ("llama3", 3, "mesh tp = 3 shard GQA.g -> tp, Layer.f -> tp, vocab -> tp"),
    # Four ranks share two heads of keys: the queries of a head are divided, its keys are not.
    "qwen_tp4": ("qwen2_5", 4, "mesh tp = 4 shard GQA.m -> tp"),
    "mixtral_ep2tp2": ("mixtral", 4, "mesh ep = 2, tp = 2 shard batch -> ep, "
                       "SoftmaxMoE.expert -> ep, SoftmaxMoE.f -> tp, GQA.g -> tp"),
    "qwen3_ep3": ("qwen3_moe", 3, "mesh ep = 3 shard batch -> ep, SoftmaxMoE.expert -> ep"),
    "next_dp2tp2": ("qwen3_next", 4, "mesh dp = 2, tp = 2 shard batch -> dp, "
                    "SoftmaxMoE.expert -> (dp, tp) with 2 redundant, SharedMoE.u -> tp, "
                    "GatedAttention.g -> tp"),
    "dsa_ep2tp2": ("dsv3_2", 4, "mesh ep = 2, tp = 2 shard batch -> ep, MoE.expert -> ep, "
                   "MLA.h -> tp"),
    "absorbed_tp3": ("dsv3", 3, "mesh tp = 3 shard MLA.h -> tp, vocab -> tp, MoE.f -> tp"),
}  # fmt: skip


def compiled(folder: Path, names=DEPLOYMENTS) -> None:
    for name in names:
        model, _, clauses = DEPLOYMENTS[name]
        block = next(
            line.split()[1]
            for line in (Path(dslc.__file__).parent.parent / "models" / f"{model}.arch")
            .read_text()
            .splitlines()
            if line.startswith("model ")
        )
        file = folder / f"{name}.arch"
        file.write_text(f"edition 2026\nimport {model}\ndeploy {name} of {block} {{ {clauses} }}\n")
        compile_file(str(file), set=TINY[model], deploy=name).save(folder / name)
        if not (folder / model).exists():
            compile_file(model, set=TINY[model]).save(folder / model)


def work(model) -> dict:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(51, (5, 9), generator=generator)
    with torch.no_grad():
        return {
            "ragged": model(tokens, torch.tensor([9, 4, 1, 7, 2])),
            "one token": model(tokens[:1, :1]),
            "long": model(tokens.view(1, 45)),
            "generated": model.generate(tokens, torch.tensor([1, 9, 2, 3, 1]), max_new_tokens=5),
        }


def rank(folder: Path, name: str, number: int) -> None:
    torch.save(work(dslc.load(folder / name, seed=4)), folder / f"{name}.{number}.pt")
