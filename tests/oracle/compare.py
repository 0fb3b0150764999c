"""What "equal" means: max|a - b| <= 1e-5 max|b| over a tensor of logits; greedy tokens are compared
where the reference's two best logits are more than 1e-4 max|b| apart."""

import torch
from torch import Tensor

EQUAL = 1e-5
DECISIVE = 1e-4


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def assert_equal(a: Tensor, b: Tensor, what: str = "result", tolerance: float = EQUAL) -> None:
    """`a`, ours, equals `b`, the reference's."""
    assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    assert torch.isfinite(b).all(), f"{what}: the reference itself is not finite"
    assert torch.isfinite(a).all(), (
        f"{what}: {int((~torch.isfinite(a)).sum())} values are not finite"
    )
    a, b = a.detach().double(), b.detach().double()
    difference, bound = (a - b).abs(), tolerance * b.abs().max()
    if (difference <= bound).all():
        return
    worst = torch.unravel_index(difference.argmax(), difference.shape)
    rows = (difference.flatten(0, -2) > bound).any(-1).nonzero().flatten() if a.dim() > 1 else None
    raise AssertionError(
        f"{what} differs: max|a - b| = {difference.max():.3g} = "
        f"{difference.max() / b.abs().max():.3g} max|b|, allowed {tolerance:g}\n"
        f"  worst at {tuple(map(int, worst))}: {a[worst]:.7g}, expected {b[worst]:.7g}\n"
        f"  {int((difference > bound).sum())} of {difference.numel()} values are off"
        + (f", in rows {rows[:12].tolist()} of {a[..., 0].numel()}" if rows is not None else "")
    )


def assert_greedy(reference, prompt: Tensor, output: Tensor, steps: int) -> None:
    """`output` is `prompt` and the `steps` tokens that greedy decoding adds to it.

    The reference reads the whole output at once, and each new token must be the one it finds best
    at that place. Where its two best logits are too close to tell apart the token may be another of
    the close ones; most places must not be such.
    """
    assert output.dtype == torch.int64
    assert output.tolist()[: len(prompt)] == prompt.tolist(), (
        "the output does not begin with the prompt"
    )
    assert len(output) == len(prompt) + steps, (
        f"{len(output) - len(prompt)} new tokens, expected {steps}"
    )
    logits = reference.logits([output[:-1]])[0][len(prompt) - 1 :]
    chosen, scale = output[len(prompt) :], logits.abs().max()
    decisive = 0
    for step, (row, token) in enumerate(zip(logits, chosen, strict=True)):
        best = row.topk(2).values
        clear = bool(best[0] - best[1] > DECISIVE * scale)
        decisive += clear
        behind = (best[0] - row[token]) / scale
        assert behind == 0 or (not clear and behind <= DECISIVE), (
            f"step {step}: token {int(token)}, expected {int(row.argmax())}, "
            f"which is {behind:.3g} of max|logit| better"
        )
    assert decisive >= 0.8 * steps, (
        f"only {decisive} of {steps} steps are decisive: choose another seed"
    )
