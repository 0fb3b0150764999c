"""Small random DeepSeek-V3 checkpoints, written by transformers itself.

transformers leaves the multi-token-prediction (MTP) layer out of what it saves. We have it save one
decoder layer more than the model has, with the MTP tensors hung on that layer, so that names and
layouts stay its own.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

# Primes wherever the architecture allows one: a swapped pair of dims cannot go unnoticed.
SMALL = {
    "vocab_size": 97,
    "hidden_size": 29,
    "intermediate_size": 31,
    "moe_intermediate_size": 17,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 13,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "max_position_embeddings": 640,
}

# What the published config.json says beside what transformers 5 writes.
PUBLISHED = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "ep_size": 1,
    "seq_aux": True,
    "aux_loss_alpha": 0.001,
}


def write_checkpoint(
    path: Path,
    *,
    form: str = "published",
    seed: int = 0,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    mtp: bool = True,
    constant_routing: bool = False,
    **config,
) -> Path:
    """Write a checkpoint to `path`; `config` overrides SMALL, by config.json key, `rope_theta` and
    `rope_scaling` included.

    form: "published", with rope_theta and rope_scaling at the top of config.json, or "v5", with
        rope_parameters.
    mtp: whether the file holds the MTP layer's tensors; config.json announces the layer either way.
    constant_routing: router biases so far apart that every token goes to the same experts,
        whatever the rounding.
    """
    settings = {**SMALL, **config}
    settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    layers = settings["num_hidden_layers"]
    # The MTP layer always has experts, also behind a model that is dense throughout.
    dense = min(settings["first_k_dense_replace"], layers)
    saved = {"num_hidden_layers": layers + mtp, "first_k_dense_replace": dense}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**settings, **saved}))
    if mtp:
        _hang_mtp_tensors_on(model.model.layers[layers], model)
    _randomise(model, torch.Generator().manual_seed(seed), constant_routing)
    if mtp:
        _copy_shared_tensors(model.model.layers[layers], model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.endswith("e_score_correction_bias"):  # float32 in the published file as well
            tensor.data = tensor.data.to(dtype)
    model.config.num_hidden_layers = layers
    model.save_pretrained(path, max_shard_size="16KB" if sharded else "50GB")
    _write_config(Path(path), form)
    return Path(path)


def _hang_mtp_tensors_on(layer: nn.Module, model: nn.Module) -> None:
    d, vocab = model.config.hidden_size, model.config.vocab_size
    layer.embed_tokens = nn.Embedding(vocab, d)
    layer.enorm = DeepseekV3RMSNorm(d)
    layer.hnorm = DeepseekV3RMSNorm(d)
    layer.eh_proj = nn.Linear(2 * d, d, bias=False)
    layer.shared_head = nn.Module()
    layer.shared_head.norm = DeepseekV3RMSNorm(d)
    layer.shared_head.head = nn.Linear(d, vocab, bias=False)


@torch.no_grad()
def _copy_shared_tensors(layer: nn.Module, model: nn.Module) -> None:
    """The published file repeats embedding and head under the MTP layer."""
    layer.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    layer.shared_head.head.weight.copy_(model.lm_head.weight)


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator, constant_routing: bool) -> None:
    """Values of order one everywhere: matrices keep the scale of their input, gains scatter around
    one, and the routers' biases are as wide as the scores, so that they change what is chosen."""
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor.copy_(1 + 0.2 * noise)
        elif name.endswith("e_score_correction_bias"):
            # Powers of two: sums of two of them, which decide between groups, stay apart as well.
            far_apart = 4 * 2.0 ** torch.randperm(len(tensor), generator=generator)
            tensor.copy_(far_apart if constant_routing else 0.1 * noise)
        elif name.endswith("embed_tokens.weight"):
            tensor.copy_(noise)
        else:
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)


def _write_config(path: Path, form: str) -> None:
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    rope.pop("type", None)
    if form == "v5":
        config["rope_parameters"] = rope
    elif form == "published":
        for key in ("head_dim", "qk_head_dim"):
            del config[key]
        config["torch_dtype"] = config.pop("dtype")
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
        config |= PUBLISHED
    else:
        raise ValueError(f"form is 'published' or 'v5', not {form!r}")
    (path / "config.json").write_text(json.dumps(config, indent=2))


def edit_config(path: Path, **changes) -> None:
    """Change keys of a written config.json; `...` removes one."""
    file = Path(path) / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}, indent=2))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whichever files hold them."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit_tensors(path: Path, change) -> None:
    """Rewrite a single-file checkpoint after `change(tensors)` on its dictionary of tensors."""
    file = Path(path) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
