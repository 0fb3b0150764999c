"""Small models that are hard on a compiler, each with what it means, written out in plain torch.

A reference takes the weights by their paths (float64) and the tokens of one sequence and gives the
entry's result of a whole prompt. It is written from the language's rules alone: nothing of this
project computes in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Reference = Callable[[Weights, Tensor], Tensor]

HEAD = """\
edition 2026
import std.norm
import std.ffn
import std.rotary
index t : time, s : history t
const hidden = 6
const vocab = 11
"""

TAIL = """
model Own {
  index d : hidden, w : vocab
  param embed[w,d]
  use mixer = Mixer[d]
  def main(token[t] of w) -> logits[t,w] {
    x[t,d] = embed[token[t], d]
    logits[t,w] = embed[w,d] * mixer(x[t,d])
  }
}
"""


@dataclass(frozen=True)
class Nasty:
    text: str
    references: Mapping[str, Reference]


MODELS: dict[str, Nasty] = {}


def whole(name: str, text: str, **others: Reference) -> Callable[[Reference], Reference]:
    """A model of its own; the function below is its ``main``."""

    def add(reference: Reference) -> Reference:
        MODELS[name] = Nasty(text, {"main": reference, **others})
        return reference

    return add


def mixer(
    name: str, members: str, equations: str, before: str = ""
) -> Callable[[Reference], Reference]:
    """A model around one block; the function below is the block, on x[t,d]."""

    def add(reference: Reference) -> Reference:
        def logits(w: Weights, token: Tensor) -> Tensor:
            own = {k.removeprefix("mixer."): v for k, v in w.items()}
            return reference(own, w["embed"][token]) @ w["embed"].T

        block = f"block Mixer[d] {{\n{members}\n  def (x[t,d]) -> y[t,d] {{{equations}  }}\n}}\n"
        MODELS[name] = Nasty(HEAD + before + block + TAIL, {"main": logits})
        return reference

    return add


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """Rows that see nothing are zero."""
    return torch.where((x > -inf).any(axis, keepdim=True), x.softmax(axis), 0.0)


def distance(x: Tensor) -> Tensor:
    """position[t] - position[s]"""
    at = torch.arange(len(x))
    return at[:, None] - at


def norm(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    return gain * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def swiglu(w: Weights, path: str, x: Tensor) -> Tensor:
    gate, up = x @ w[f"{path}.W_gate"].T, x @ w[f"{path}.W_up"].T
    return (gate * gate.sigmoid() * up) @ w[f"{path}.W_down"].T


# -- attention and its masks -----------------------------------------------------------------------

ATTENTION = """
  index h : 3, n : 4, v : 5
  param W_q[(h,n), d]  param W_k[(h,n), d]  param W_v[(h,v), d]  param W_o[d, (h,v)]  param slope[h]
"""


def attention(scores: str, mask: str) -> str:
    return f"""
    q[t,h,n]          = W_q[(h,n),d] * x[t,d]
    cached k[s,h,n]   = W_k[(h,n),d] * x[t,d]
    cached val[s,h,v] = W_v[(h,v),d] * x[t,d]
    let score[h,t,s]: f32 = {scores}
    let p[h,t,s]: f32 = softmax[s](where({mask}, score[h,t,s], -inf))
    o[t,h,v]          = p[h,t,s] * val[s,h,v]
    y[t,d]            = x[t,d] + W_o[d,(h,v)] * o[t,h,v]
"""


def attended(w: Weights, x: Tensor, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    q = (x @ w["W_q"].T).unflatten(-1, (3, 4))
    k = (x @ w["W_k"].T).unflatten(-1, (3, 4))
    value = (x @ w["W_v"].T).unflatten(-1, (3, 5))
    score = torch.einsum("thn,shn->hts", q, k) * 0.7 + bias
    o = torch.einsum("hts,shv->thv", softmax(score.masked_fill(~seen, -inf)), value)
    return x + o.flatten(-2) @ w["W_o"].T
