"""The published FP8 form of a checkpoint, written tile by tile without anything of the product.

Every projection of attention, dense FFN, routed and shared experts is stored as E4M3 with a float32
`weight_scale_inv` per tile of 128 x 128; tiles at the edges are partial. Embedding, head, router,
norms and the MTP layer's eh_proj stay as they were.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from oracle.checkpoint import edit_config, read_tensors

FP8_LINEAR = re.compile(
    r"model\.layers\.\d+\."
    r"(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj)\.weight"
)
E4M3_MAX = 448.0


def is_fp8(name: str) -> bool:
    return FP8_LINEAR.fullmatch(name) is not None


def quantise_tile(tile: Tensor) -> tuple[Tensor, Tensor]:
    """One tile and its scale: the largest magnitude becomes E4M3's largest."""
    scale = tile.float().abs().max() / E4M3_MAX
    if scale == 0:
        scale = torch.ones(())
    return (tile.float() / scale).to(torch.float8_e4m3fn), scale


def dequantise_tile(tile: Tensor, scale: Tensor) -> Tensor:
    return tile.float() * scale


def quantise(weight: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in E4M3, its scales, and what the two stand for."""
    rows, columns = weight.shape
    stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    meant = torch.empty(rows, columns, dtype=torch.float32)
    scales = torch.empty(-(-rows // tile[0]), -(-columns // tile[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            there = (slice(i * tile[0], (i + 1) * tile[0]), slice(j * tile[1], (j + 1) * tile[1]))
            stored[there], scales[i, j] = quantise_tile(weight[there])
            meant[there] = dequantise_tile(stored[there], scales[i, j])
    return stored, scales, meant


def to_fp8(source: Path, target: Path, *, tile=(128, 128), shards: int = 1) -> Path:
    """Write `source` in FP8 to `target`, and beside it, to `target`-dequantised, the float32
    checkpoint that it stands for. The second path is returned. With several shards a weight and its
    scales lie in different files."""
    target = Path(target)
    twin = target.with_name(target.name + "-dequantised")
    quantised: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in read_tensors(source).items():
        if is_fp8(name):
            quantised[name], scales[name + "_scale_inv"], meant[name] = quantise(tensor, tile)
        else:
            keep = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
            quantised[name], meant[name] = keep, keep.float()

    for folder in (target, twin):
        folder.mkdir(parents=True)
        shutil.copy(Path(source) / "config.json", folder)
    save_file(meant, twin / "model.safetensors", metadata={"format": "pt"})
    edit_config(target, quantization_config=quantization_config(tile))
    if shards == 1:
        save_file(quantised | scales, target / "model.safetensors", metadata={"format": "pt"})
        return twin
    names = sorted(quantised)
    parts = [{n: quantised[n] for n in names[i :: shards - 1]} for i in range(shards - 1)]
    _save_sharded(target, [*parts, scales])
    return twin


def quantization_config(tile: tuple[int, int]) -> dict:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(tile),
    }


def _save_sharded(folder: Path, parts: list[dict[str, Tensor]]) -> None:
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):06}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.nbytes for part in parts for t in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
