"""A checkpoint's weights as the GGUF file that llama.cpp reads, for the families it can be held to.

Which keys and tensors llama.cpp wants is the ``gguf`` package's knowledge; what they hold is
computed here from ``config.json``. There is no vocabulary in the file: token numbers go in and out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.pytorch.weights.checkpoint import Checkpoint, open_checkpoint
from backends.pytorch.weights.tensorfile import Reader
from dslc.bench.contestants import Absent

FAMILIES = {"deepseek_v2", "deepseek_v3"}
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight")


def write(folder: Path, to: Path, context: int) -> None:
    """Write a checkpoint's main model, in the dtypes it has, norms and routers in f32.

    Raises:
        Absent: there is no writer for its family, or ``gguf`` is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise Absent("the package gguf is not installed") from None
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise Absent(f"no GGUF is written for model_type {family}")
    if checkpoint.block:
        raise Absent("GGUF has no block-scaled FP8")
    writer = gguf.GGUFWriter(to, "deepseek2")
    _keys(writer, gguf, config, context)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
    for name, tensor in _tensors(checkpoint):
        stem, _, kind = name.rpartition(".")
        found = names.get_name(stem)
        if found is None:
            raise Absent(f"GGUF has no name for {name}")
        small = tensor.ndim == 1 or ".gate." in name
        data = tensor.float() if small else tensor
        if data.dtype == torch.bfloat16:
            array = data.contiguous().view(torch.uint8).numpy()
            raw = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(f"{found}.{kind}", array, raw_dtype=raw)
        else:
            writer.add_tensor(f"{found}.{kind}", data.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _keys(writer: Any, gguf: Any, config: dict[str, Any], context: int) -> None:
    rope, latent = config["qk_rope_head_dim"], config["kv_lora_rank"]
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)  # all heads share the latent vector
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(config.get("rope_theta") or _rope(config).get("rope_theta", 10000.0))
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(bool(config.get("norm_topk_prob")))
    sigmoid = config.get(
        "scoring_func", "sigmoid" if config["model_type"][-1] == "3" else "softmax"
    )
    gating = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(gating.SIGMOID if sigmoid == "sigmoid" else gating.SOFTMAX)
    if config.get("n_group", 1) > 1:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    scaling = _rope(config)
    if scaling.get("rope_type", scaling.get("type")) == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling.get("mscale_all_dim", 0.0))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The main model's tensors as llama.cpp has them: experts stacked, W_kv_b in two parts."""
    config = checkpoint.config
    layers = config["num_hidden_layers"]
    experts: dict[tuple[str, str], dict[int, str]] = {}
    with Reader() as reader:

        def read(name: str) -> Tensor:
            return reader.read(checkpoint.tensors[name])

        for name in checkpoint.tensors:
            number = re.match(r"model\.layers\.(\d+)\.", name)
            if number and int(number[1]) >= layers:
                continue  # multi-token prediction
            if expert := EXPERT.fullmatch(name):
                experts.setdefault((expert[1], expert[3]), {})[int(expert[2])] = name
            elif name.endswith("kv_b_proj.weight"):
                heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
                both = read(name).unflatten(0, (heads, -1))
                yield name.replace("kv_b_proj", "k_b_proj"), both[:, :nope].transpose(1, 2)
                yield name.replace("kv_b_proj", "v_b_proj"), both[:, nope:]
            elif name.endswith("e_score_correction_bias"):
                yield f"{name.removesuffix('_bias')}.bias", read(name)
            else:
                yield name, read(name)
        for (stem, part), by_number in experts.items():
            stacked = torch.stack([read(by_number[n]) for n in sorted(by_number)])
            yield f"{stem}.{part}.weight", stacked
