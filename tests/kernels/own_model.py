"""A model with an activation and norms of its author's own."""

OWN = """edition 2026

import std.norm

index t : time

const width = 96
const count = 50

block Wave[d] {
  param gain[d]
  param shift[d]

  def (x[d]) -> y[d] {
    let near[d] = exp(-x[d] * x[d] * 0.5)
    y[d] = gain[d] * near[d] * tanh(x[d] - 0.1 * x[d] ^ 3) + shift[d] * x[d] ^ 2
  }
}

# Each head by itself, without a gain; and a softmax along it.
block HeadNorm[d] {
  index h : 4, n : width / 4
  param W[(h, n), d]

  def (x[d]) -> y[d] {
    q[h,n] = W[(h,n),d] * x[d]
    let least[h]: f32  = min[n](q[h,n])
    p[h,n] = softmax[n](q[h,n] * least[h])
    y[d] = W[(h,n),d] * p[h,n]
  }
}

model Own {
  index w : count, d : width
  param embed[w, d]
  use wave = Wave[d]
  use norm = LayerNorm[d]
  use heads = HeadNorm[d]

  def main(token[t] of w) -> logits[t,w] {
    x[t,d]      = embed[token[t], d]
    h[t,d]      = heads(norm(x[t,d] + wave(x[t,d])))
    logits[t,w] = embed[w,d] * h[t,d]
  }
}
"""
