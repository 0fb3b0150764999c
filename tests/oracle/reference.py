"""What transformers computes on a checkpoint: logits, greedy tokens, MTP logits, gradients, and how
close its routing decisions were."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()


class Reference:
    """transformers on a checkpoint. Sequences go through it one by one: nothing is padded."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32):
        # Eager experts and attention: the fused ones refuse odd dims and round elsewhere.
        self.model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        self.layers = self.model.config.num_hidden_layers
        self._mtp: MtpModel | None = None

    @torch.no_grad()
    def logits(self, sequences: list[Tensor]) -> list[Tensor]:
        """[time, vocab] in float32 for each sequence."""
        return [self.model(tokens[None]).logits[0].float() for tokens in sequences]

    @property
    def mtp(self) -> MtpModel:
        """The MTP module. transformers looks for it at layer 61 only, so it is told where."""
        if self._mtp is None:
            self.model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{self.layers}\..*"]
            self._mtp = MtpModel.from_pretrained(self.model).eval()
        return self._mtp

    def _mtp_logits(self, tokens: Tensor) -> Tensor:
        """[time - 1, vocab]: row t has seen tokens up to t + 1 and predicts token t + 2."""
        rows: list[Tensor] = []
        layer = self.mtp.layers[0]
        hook = layer.register_forward_hook(lambda _, __, output: rows.append(output[0]))
        hidden = self.model.model(tokens[None]).last_hidden_state
        later = tokens[None, 1:]
        positions = torch.arange(1, len(tokens))[None]
        self.mtp(later, hidden[:, :-1], torch.ones_like(later), positions, None)
        hook.remove()
        return self.model.lm_head(rows[0])

    @torch.no_grad()
    def mtp_logits(self, sequences: list[Tensor]) -> list[Tensor]:
        """[time - 1, vocab] in float32 for each sequence."""
        return [self._mtp_logits(tokens).float() for tokens in sequences]

    @torch.no_grad()
    def greedy(self, prompt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Prompt and continuation, and for each step how far the best logit leads the second, as a
        part of the largest magnitude."""
        tokens, margins = prompt, []
        for _ in range(steps):
            row = self.logits([tokens])[0][-1]
            best = row.topk(2).values
            margins.append((best[0] - best[1]) / row.abs().max())
            tokens = torch.cat([tokens, row.argmax()[None]])
        return tokens, torch.stack(margins)

    def gradients(self, tokens: Tensor, *, mtp: bool = False) -> dict[str, Tensor]:
        """Gradients of the next-token loss over one sequence, by the checkpoint's names; with `mtp`
        of the MTP module's loss, which reaches through the whole model."""
        modules = [self.model, self.mtp] if mtp else [self.model]
        for module in modules:
            module.zero_grad()
        if mtp:
            loss = F.cross_entropy(self._mtp_logits(tokens)[:-1].float(), tokens[2:])
        else:
            loss = F.cross_entropy(self.model(tokens[None]).logits[0, :-1].float(), tokens[1:])
        loss.backward()
        found = dict(_by_checkpoint_name(self.model))
        if mtp:
            to_file = {".mtp_block.": ".", "post_norm": "shared_head.norm"}
            for name, gradient in _by_checkpoint_name(self.mtp):
                if name.startswith("layers.0."):
                    name = name.replace("layers.0.", f"model.layers.{self.layers}.", 1)
                    for ours, theirs in to_file.items():
                        name = name.replace(ours, theirs)
                    found[name] = gradient
        return found

    @torch.no_grad()
    def routing_margin(self, sequences: list[Tensor], *, mtp: bool = False) -> float:
        """How far the closest routing decision was from going otherwise, over all tokens, layers
        and choices (of groups and of experts). Rounding may change a choice of almost no margin,
        and all that follows it."""
        margins: list[Tensor] = []

        def measure(router, _, output):
            margins.append(_router_margin(router, output[0]))

        modules = [*self.model.modules(), *(self.mtp.modules() if mtp else ())]
        routers = [m for m in modules if type(m).__name__.lower().endswith("topkrouter")]
        hooks = [m.register_forward_hook(measure) for m in routers]
        (self.mtp_logits if mtp else self.logits)(sequences)
        for hook in hooks:
            hook.remove()
        return float(torch.stack(margins).min()) if margins else float("inf")


def _by_checkpoint_name(module: nn.Module):
    """Gradients under the names of the file, where each expert has tensors of its own."""
    for name, parameter in module.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, both in enumerate(gradient):
                gate, up = both.chunk(2)
                yield f"{prefix}.{e}.gate_proj.weight", gate
                yield f"{prefix}.{e}.up_proj.weight", up
        elif last == "down_proj":
            for e, down in enumerate(gradient):
                yield f"{prefix}.{e}.down_proj.weight", down
        else:
            yield name, gradient


def _router_margin(router: nn.Module, logits: Tensor) -> Tensor:
    """The margin of one router's choices. Softmax routers are measured on their probabilities."""
    if hasattr(router, "e_score_correction_bias"):  # DeepSeek-V3: a group is worth its best two
        scores, best = logits.sigmoid() + router.e_score_correction_bias, 2
    else:
        scores, best = logits.float().softmax(-1), 1
    groups, opened = getattr(router, "num_group", None), getattr(router, "topk_group", None)
    if groups is None or getattr(router, "topk_method", "") == "greedy":
        return _gap(scores, router.top_k)
    grouped = scores.view(len(scores), groups, -1)
    worth = grouped.topk(best, dim=-1).values.sum(-1)
    is_open = torch.zeros_like(worth).scatter(1, worth.topk(opened).indices, 1.0).bool()
    closed_out = grouped.masked_fill(~is_open[:, :, None], -torch.inf).flatten(1)
    return torch.minimum(_gap(worth, opened), _gap(closed_out, router.top_k))


def _gap(scores: Tensor, k: int) -> Tensor:
    """The least distance between the k-th best score and the next; closed ones are alike."""
    if k == scores.shape[-1]:
        return torch.tensor(torch.inf)
    best = scores.topk(k + 1).values
    return (best[:, k - 1] - best[:, k]).nan_to_num(torch.inf).min()
