"""Deployments of a model that nobody prepared for: verified on every mesh, emitted as Python."""

import ast

import pytest

from backends.pytorch.emit.module import emit
from compiler.equivalence import equivalent
from compiler.passes.placing import NotBuilt
from compiler.pipeline import compile_model
from dsl.constants import Choices
from dsl.diagnostics import DiagnosticError

MODEL = """
edition 2026
import std.norm
index t : time, s : history t
const hidden = 24
const slots  = 5
const blocks = 3

block Unit[d] {
  index f : 11
  param up[f, d]
  param down[d, f]
  def (x[d]) -> y[d] {
    a[f] = tanh(up[f,d] * x[d])
    y[d] = down[d,f] * a[f]
  }
}

# Lample et al. 2019 (arXiv:1907.05242): values are looked up by a product of two keys.
block Memory[d] {
  index i : slots, j : slots, ij = (i, j), m : 2
  param left[i, d]
  param right[j, d]
  param value[(i, j), d]
  def (x[d]) -> y[d] {
    both[(i,j)] = broadcast[j](left[i,d] * x[d]) + broadcast[i](right[j,d] * x[d])
    best[m]     = argtop[ij -> m](both[ij])
    y[d]        = softmax[m](top[ij -> m](both[ij])) * value[best[m],d]
  }
}

block Mix[d] {
  index e : blocks, k : 2
  param centroid[e, d]
  use unit[e] = Unit[d]
  def (x[d]) -> y[d] {
    score[e] = softmax[e](centroid[e,d] * x[d])
    pick[k]  = argtop[e -> k](score[e])
    y[d]     = score[pick[k]] * unit[pick[k]](x[d])
  }
}

block Layer[d] {
  index h : 4, n : 3
  param W_kv[(h, n|o), d]
  index o : 3
  param W_q[(h, n), d]
  param W_o[d, (h, o)]
  use norm = RMSNorm[d]
  use mix = Mix[d]
  use memory = Memory[d]
  def (x[t,d]) -> y[t,d] {
    u[t,d]             = norm(x[t,d])
    kv[t,h,n|o]        = W_kv[(h,n|o),d] * u[t,d]
    cached key[s,h,n]  = kv[t,h,n]
    cached val[s,h,o]  = kv[t,h,o]
    q[t,h,n]           = W_q[(h,n),d] * u[t,d]
    score[t,h,s]       = q[t,h,n] * key[s,h,n]
    p[t,h,s]           = softmax[s](where(position[s] <= position[t], score[t,h,s], -inf))
    a[t,h,o]           = p[t,h,s] * val[s,h,o]
    y[t,d]             = x[t,d] + W_o[d,(h,o)] * a[t,h,o] + mix(u[t,d]) + memory(u[t,d])
  }
}

model Own {
  index d : hidden, w : 26, l : 2
  param embed[w, d]
  use first = RMSNorm[d]
  use layer[l] = Layer[d]
  def main(token[t] of w) -> logits[t,w] {
    logits[t,w] = embed[w,d] * chain[l](layer, first(embed[token[t],d]))
  }
}
"""

INNER = """
block Inner[d] {
  index e : 4, q : 1
  param centroid[e, d]
  use leaf[e] = Unit[d]
  def (x[d]) -> y[d] {
    score[e] = centroid[e,d] * x[d]
    pick[q]  = argtop[e -> q](score[e])
    gate[q]  = sigmoid(score[pick[q]])
    y[d]     = gate[q] * leaf[pick[q]](x[d])
  }
}
"""

DEPLOYS = {
    "three blocks, of which two are picked": "mesh ep = 3  shard batch -> ep, Mix.unit -> ep",
    "an extent that is a number": "mesh tp = 11  shard Unit.f -> tp",
    "one part of the product that is looked up": "mesh tp = 5  shard Memory.i -> tp",
    "layers that take other placements in turn": (
        "mesh tp = 2, dp = 2  shard hidden -> tp, batch -> dp"
    ),
    "tiles that ranks share": (
        "mesh tp = 4  shard Layer.h -> tp  "
        "precision fp8(e4m3, activations = 1 x 3, weights = 3 x 3) for Layer.W_o, Layer.W_q"
    ),
}


def compiled(tmp_path, deploy):
    file = tmp_path / "own.arch"
    file.write_text(f"{MODEL}\nimport std.formats\ndeploy here of Own {{ {deploy} }}")
    return compile_model(str(file), Choices(), deploy="here")


@pytest.mark.parametrize("deploy", DEPLOYS.values(), ids=DEPLOYS.keys())
def test_every_rank_computes_what_one_would(tmp_path, deploy):
    stages = compiled(tmp_path, deploy)
    equivalent(stages.after("recognise"), stages.after("shard"))
    equivalent(stages.after("shard"), stages.after("fp8"))
    ast.parse(emit(stages.after("lifetimes")))


def test_a_block_with_two_placements_has_two_methods(tmp_path):
    stages = compiled(tmp_path, DEPLOYS["layers that take other placements in turn"])
    layer = stages.after("shard").modules["Layer"]
    assert list(layer.methods) == ["call", "call'"]  # the chain begins with a whole value
    code = emit(stages.after("lifetimes"))
    ast.parse(code)
    assert "def call" not in code


def test_only_the_outermost_part_of_a_named_product_is_divided(tmp_path):
    with pytest.raises(DiagnosticError, match="'ij' cannot be divided along 'j'"):
        compiled(tmp_path, "mesh tp = 5  shard Memory.j -> tp")


def test_blocks_in_picked_blocks_are_not_sent_tokens(tmp_path):
    """Ranks where nobody picked the block around them would not come to the exchange."""
    text = MODEL.replace("use unit[e] = Unit[d]", "use unit[e] = Inner[d]") + INNER
    file = tmp_path / "own.arch"
    file.write_text(
        text + "deploy here of Own { mesh ep = 2  shard batch -> ep, Inner.leaf -> ep }"
    )
    line = 1 + text[: text.index("gate[q] * leaf")].count("\n")
    with pytest.raises(NotBuilt) as raised:
        compile_model(str(file), Choices(), deploy="here")
    assert str(raised.value) == (
        f"{file}:{line}: the blocks of 'leaf' cannot be dealt out over 'ep', which sequences are "
        "spread over: they stand in blocks that are picked themselves; deal those out instead"
    )


def test_blocks_in_picked_blocks_share_the_work_of_ranks_with_the_same_tokens(tmp_path):
    file = tmp_path / "own.arch"
    text = MODEL.replace("use unit[e] = Unit[d]", "use unit[e] = Inner[d]") + INNER
    deploy = "mesh ep = 3, tp = 2  shard batch -> ep, Mix.unit -> ep, Inner.leaf -> tp"
    file.write_text(f"{text}deploy here of Own {{ {deploy} }}")
    stages = compile_model(str(file), Choices(), deploy="here")
    equivalent(stages.after("recognise"), stages.after("shard"))
