"""A small model in which matrices are read whole, in views, in parts, and twice."""

RECIPE = "e4m3, activations = 1 x 128, weights = 128 x 128, promote = 128"

ARCH = """
edition 2026
import std.norm
import std.ffn
import std.formats

const vocab = 40
const hidden = 12
index t : time

block Mixed[d] {
  index h : 2, n : 3, a : 7, b : 5
  param W[(h, n), d]
  param U[a|b, d]
  param V[d, (h, n)]
  param P[d, a|b]
  def (x[t,d]) -> y[t,d] {
    q[t,h,n] = W[(h,n),d] * x[t,d]
    r[t,h,n] = W[(h,n),d] * x[t,d] * 0.5
    u[t,a|b] = U[a|b,d] * x[t,d]
    o[t,d]   = V[d,(h,n)] * q[t,h,n]
    p[t,d]   = P[d,a] * u[t,a] + P[d,b] * u[t,b]
    y[t,d]   = o[t,d] + p[t,d] + V[d,(h,n)] * r[t,h,n]
  }
}

model Small {
  index d : hidden, w : vocab
  param embed[w, d]
  use norm = RMSNorm[d]
  use mixed = Mixed[d]
  index f : 10
  use mlp = SwiGLU[d, f]
  def main(token[t] of w) -> logits[t,w] {
    x0[t,d] = embed[token[t], d]
    x1[t,d] = x0[t,d] + mixed(norm(x0[t,d]))
    x2[t,d] = x1[t,d] + mlp(x1[t,d])
    logits[t,w] = embed[w,d] * x2[t,d]
  }
}
"""
