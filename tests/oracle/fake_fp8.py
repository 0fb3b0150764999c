"""transformers with its linears in the published FP8 recipe, without anything of the product.

Weights become what their tiles of 128 x 128 stand for; inputs are quantised in tiles of 1 x 128,
value by value, and products are taken in float64. kv_b_proj, which is absorbed where few
positions are asked for, keeps its input as it is. Embedding, head and router stay.
"""

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from oracle.fp8 import E4M3_MAX, quantise

COLUMNS = 128


def fake_activations(x: Tensor) -> Tensor:
    """What each row stands for after quantising 128 of its elements at a time."""
    out = torch.empty_like(x, dtype=torch.float64)
    for start in range(0, x.shape[-1], COLUMNS):
        part = x[..., start : start + COLUMNS].float()
        scale = part.abs().amax(-1, keepdim=True) / E4M3_MAX
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = (part / scale).to(torch.float8_e4m3fn)
        out[..., start : start + COLUMNS] = codes.double() * scale.double()
    return out


def product(x: Tensor, weight: Tensor) -> Tensor:
    return (fake_activations(x) @ weight.double().T).to(x.dtype)


def patched(model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
    """Make every linear of the layers an FP8 one.

    Returns:
        By the name of its weight in the checkpoint, what each product was given, what it was
        multiplied with before quantising, and what it gave; filled as the model runs.
    """
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            module.forward = _linear(seen, f"{name}.weight", module)
        if isinstance(module, deepseek.DeepseekV3Experts):
            module.forward = _experts(seen, name, module)
    return seen


def _linear(seen, name, module):
    exact = module.weight.detach().clone()
    _, _, meant = quantise(exact, (128, 128))
    if name.endswith("kv_b_proj.weight"):
        return lambda x: nn.functional.linear(x, meant.to(x.dtype))

    def forward(x: Tensor) -> Tensor:
        out = product(x, meant)
        seen.setdefault(name, []).append((x.flatten(0, -2), exact, out.flatten(0, -2)))
        return out

    return forward


def _experts(seen, name, module):
    """Expert by expert, as each token picked."""
    weights = []
    for number in range(module.num_experts):
        gate, up = module.gate_up_proj[number].detach().chunk(2)
        down = module.down_proj[number].detach()
        own = [("gate_proj", gate), ("up_proj", up), ("down_proj", down)]
        weights.append(
            [(f"{name}.{number}.{n}.weight", w, quantise(w, (128, 128))[2]) for n, w in own]
        )

    def one(x: Tensor, item) -> Tensor:
        own, exact, meant = item
        out = product(x, meant)
        seen.setdefault(own, []).append((x, exact, out))
        return out

    def forward(hidden: Tensor, picks: Tensor, gates: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for number, (gate, up, down) in enumerate(weights):
            rows, places = torch.where(picks == number)
            if len(rows):
                x = hidden[rows]
                inner = module.act_fn(one(x, gate)) * one(x, up)
                total.index_add_(0, rows, one(inner, down) * gates[rows, places, None])
        return total

    return forward
