"""Hard models whose difficulty is in blocks, picks, functions and entries."""

from __future__ import annotations

from math import exp, inf, sqrt

import torch
from torch import Tensor

from tests.nasty.base import (
    HEAD,
    Weights,
    distance,
    mixer,
    norm,
    swiglu,
    whole,
)


@mixer("one index as a sum and back, and a sum within a sum", """
  index n : 9, j : 4, a : 5, i : 2, u = i|j
  param W[n|u, d]  param V[d, n]  param U[d, (i|j)|k]  index k : 3
""", """
    w[t,n|u]      = W[n|u,d] * x[t,d]
    y0[t,n]       = turned[n](w[t,n])
    z[t,i|j]      = w[t,i|j]
    let m[t,n]    = y0[t,n]
    let r[t,j|a]  = m[t,j|a]
    p[t,(i|j)|k]  = concat[(i|j)|k](2 * w[t,(i|j)], last[a,k](r[t,a]))
    y[t,d]        = V[d,n] * y0[t,n] + U[d,(i|j)|k] * p[t,(i|j)|k] * sum[j](z[t,j] * r[t,j])
""", """
fn turned[n](x[n]) -> y[n] {
  index j : 4, a : size(n) - 4
  let parts[j|a] = x[j|a]
  let made[j|a]  = concat[j|a](-parts[j], parts[a] * parts[a])
  y[n] = made[n]
}

fn last[a,k](x[a]) -> y[k] {
  index b : size(a) - size(k)
  let parts[b|k] = x[b|k]
  y[k] = parts[k]
}
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    n, u = (x @ w["W"].T).split((9, 6), -1)
    y0 = torch.cat((-n[:, :4], n[:, 4:] ** 2), -1)
    p = torch.cat((2 * u, y0[:, 6:]), -1)
    scale = (u[:, 2:] * y0[:, :4]).sum(-1, keepdim=True)
    return y0 @ w["V"].T + p @ w["U"].T * scale


@mixer("groups of experts, one index spelled two ways", """
  index g : 3, m : 2, e = (g,m), k : 2, i : 2
  param R[e,d]  param rows[e,d]
""", """
    aff[t,e] = sigmoid(R[e,d] * x[t,d])
    worth[t,g] = sum[i](top[m -> i](aff[t,(g,m)]))
    open[t,g] = in_top[g, 2](worth[t,g])
    pick[t,k] = argtop[e -> k](where(open[t,g], aff[t,(g,m)], -inf))
    weight[t,k] = aff[t,pick[t,k]]
    row[t,k,d] = rows[pick[t,k],d]
    y[t,d] = weight[t,k] * row[t,k,d]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    out = []
    for affinity in (x @ w["R"].T).sigmoid():
        groups = sorted(range(3), key=lambda g, a=affinity: -float(a[2 * g] + a[2 * g + 1]))[:2]
        among = [e for g in sorted(groups) for e in (2 * g, 2 * g + 1)]
        best = sorted(among, key=lambda e, a=affinity: -float(a[e]))[:2]
        out.append(sum(affinity[e] * w["rows"][e] for e in best))
    return torch.stack(out)


@mixer("a pick of picks", """
  index e : 5, k : 3, l : 2
  param R[e,d]  param rows[e,d]
""", """
    aff[t,e] = cos(R[e,d] * x[t,d])
    a[t,k] = argtop[e -> k](R[e,d] * x[t,d])
    b[t,l] = argtop[k -> l](aff[t,a[t,k]])
    y[t,d] = x[t,d] + sum[l](rows[a[t,b[t,l]],d])
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    out = []
    for row in x:
        score = w["R"] @ row
        a = score.argsort(descending=True)[:3]
        b = score.cos()[a].argsort(descending=True)[:2]
        out.append(row + w["rows"][a[b]].sum(0))
    return torch.stack(out)


TWO = """
block Two[d] {
  index a : size(d)
  param A[a,d]  param B[d,a]  param c
  def (x[d], b[d]) -> y[d] {
    u[a] = tanh(A[a,d] * (x[d] + b[d])) * c
    y[d] = B[d,a] * u[a]
  }
}
"""


@mixer("experts of each head, one argument the same for all", """
  index h : 2, e : 4, k : 2
  param R[h,e,d]  param b[d]  use two[e] = Two[d]
""", """
    sc[t,h,e] = R[h,e,d] * x[t,d]
    pick[t,h,k] = argtop[e -> k](sc[t,h,e])
    let z[t,h,k,d] = two[pick[t,h,k]](x[t,d], b[d])
    let zh[t,h,d] = z[t,h,k,d] * sc[t,h,pick[t,h,k]]
    y[t,d] = x[t,d] + sum[h](zh[t,h,d])
""", TWO)  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    y = x.clone()
    for t, row in enumerate(x):
        for h in range(2):
            score = w["R"][h] @ row
            for e in score.argsort(descending=True)[:2].tolist():
                u = (w[f"two[{e}].A"] @ (row + w["b"])).tanh() * w[f"two[{e}].c"]
                y[t] += score[e] * (w[f"two[{e}].B"] @ u)
    return y


@mixer("one expert of one, everything of extent one", """
  index e : 1, k : 1, f : 1, h : 1, n : 1
  param R[e,d]  param Q[(h,n),d]  param O[d,(h,n)]  use ff[e] = SwiGLU[d,f]
""", """
    sc[t,e] = R[e,d] * x[t,d]
    pick[t,k] = argtop[e -> k](sc[t,e])
    let routed[t,d] = sc[t,pick[t,k]] * ff[pick[t,k]](x[t,d])
    q[t,h,n] = Q[(h,n),d] * x[t,d]
    cached c[s,n] = sum[h](q[t,h,n])
    let p[h,t,s]: f32 = softmax[s](where(position[s] <= position[t], q[t,h,n] * c[s,n], -inf))
    let o[t,h,n] = p[h,t,s] * c[s,n]
    y[t,d] = routed[t,d] + O[d,(h,n)] * o[t,h,n]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    routed = (x @ w["R"].T) * swiglu(w, "ff[0]", x)
    q = x @ w["Q"].T
    p = (q @ q.T).masked_fill(distance(x) < 0, -inf).softmax(-1)
    return routed + p @ q @ w["O"].T


# -- indices, numbers, functions -------------------------------------------------------------------


@mixer("sums in products on both sides of a matrix", """
  index h : 3, n : 2, v : 4, c : 3, j : size(d) - 2
  param U[c|j,d]  param W[(h,n|v), c|j]  param O[d,(h,v)]  param P[d,(h,n)]
""", """
    u[t,c|j] = U[c|j,d] * x[t,d]
    q[t,h,n|v] = W[(h,n|v),c|j] * u[t,c|j]
    let r[t,h,n] = W[(h,n),j] * u[t,j]
    y[t,d] = O[d,(h,v)] * q[t,h,v] + P[d,(h,n)] * (q[t,h,n] - r[t,h,n])
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    u = x @ w["U"].T
    q = (u @ w["W"].T).unflatten(-1, (3, 6))
    r = (u[:, 3:] @ w["W"][:, 3:].T).unflatten(-1, (3, 6))[..., :2]
    n, v = q[..., :2] - r, q[..., 2:]
    return v.flatten(-2) @ w["O"].T + n.flatten(-2) @ w["P"].T


@mixer("one extent under three names", """
  index a : size(d), b : size(d), p : size(d) / 2, o : 2
  param A[a,d]
""", """
    z[t,a] = A[a,d] * x[t,d]
    u[t,d] = z[t,d] + x[t,d]
    let pair[t,a,b] = z[t,a] * x[t,b]
    v[t,(p,o)] = stack[o](x[t,(p,1)], u[t,(p,0)] * 2)
    r[t,(o,p)] = stack[o](x[t,(0,p)], z[t,(1,p)])
    y[t,d] = sum[b](pair[t,d,b]) - sum[a](pair[t,a,d]) + v[t,d] * x[t,0] + r[t,d] + u[t,d] * z[t,d]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    z = x @ w["A"].T
    u, v = z + x, torch.empty_like(x)
    v[:, 0::2], v[:, 1::2] = x[:, 1::2], u[:, 0::2] * 2
    r = torch.cat((x[:, :3], z[:, 3:]), -1)
    rows, columns = z * x.sum(-1, keepdim=True), x * z.sum(-1, keepdim=True)
    return rows - columns + v * x[:, :1] + r + u * z


@mixer("functions, and numbers known while compiling", """
  index h : 2, n : 3
  param W[(h,n),d]  param G[h,n]  param O[d,h]
""", """
    b[t,h,n] = soft[n](W[(h,n),d] * x[t,d])
    c[t,h] = dot[n](b[t,h,n], G[h,n])
    cached e[s,h] = c[t,h]
    let f[t,h] = sum[s](where(position[s] <= position[t], gated(e[s,h], c[t,h]), 0.0))
    let k[t,d] = x[t,d] * (2 / 3) + sqrt(2) * exp(0 - 1) + max(x[t,d], 0) * min(1, 2)
    let m[t,d] = where(1 < 2, x[t,d], 0) + 7 / 2 - (0 - 3) ^ 2 + where(position[t] > 1, 1, 0)
    y[t,d] = O[d,h] * f[t,h] + k[t,d] + m[t,d]
""", """
fn soft[i](x[i]) -> y[i] {
  let most = max[i](x[i])
  let e[i]: f32 = exp(x[i] - most)
  y[i] = e[i] / sum[i](e[i])
}
fn dot[i](x[i], z[i]) -> y { y = x[i] * z[i] }
fn gated(a, b) -> y { y = a * sigmoid(b) }
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    b = (x @ w["W"].T).unflatten(-1, (2, 3)).softmax(-1)
    c = (b * w["G"]).sum(-1)
    f = torch.where((distance(x) >= 0)[..., None], c * c[:, None].sigmoid(), 0.0).sum(1)
    k = x * (2 / 3) + sqrt(2) * exp(-1) + x.clamp(min=0)
    late = (torch.arange(len(x)) > 1)[:, None].double()
    return f @ w["O"].T + k + x + 3.5 - 9 + late


NUMBERS = """
block N[d] {
  param g[d]
  def (x[d]) -> y[d] { y[d] = x[d] * g[d] }
  def scaled(x[d], c) -> y[d] { y[d] = x[d] * c }
  def places(x[d]) -> y[d] { y[d] = d }
}
block C[d] {
  def (x[t,d]) -> y[t,d] { y[t,d] = where(x[t,d] > 0, 1, 0) + d }
}
"""


@mixer("whole numbers where blocks take and give activations", """
  index i : 2
  use n = N[d]  use c[i] = C[d]
""", """
    late[t,d]: f32 = where(position[t] > 1, 1, 0) * (d + 1)
    u[t,d] = n(late[t,d]) + n.scaled(x[t,d], 2) + n.scaled(x[t,d], position[t])
    let whole[t,d] = where(x[t,d] > 0, 1, 0) + d
    let unit[t,d] = whole[t,d] * rsqrt(mean[d](whole[t,d] * whole[t,d]) + 1)
    y[t,d] = u[t,d] + unit[t,d] + chain[i](c, whole[t,d]) * n.places(x[t,d])
""", NUMBERS)  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    at, d = torch.arange(len(x))[:, None], torch.arange(6)
    u = (at > 1) * (d + 1) * w["n.g"] + 2 * x + at * x
    whole = (x > 0).double() + d
    unit = whole / (whole.pow(2).mean(-1, keepdim=True) + 1).sqrt()
    twice = ((((whole > 0) + d) > 0) + d).double()
    return u + unit + twice * d


@mixer("tables that are joined, taken apart and stacked", """
  index p : size(d) / 2, o : 2, k : 2
  param W[p]
""", """
    let a[p,o] = 1.5 ^ (p - o)
    let b[(p,o)] = a[p,o]
    let c[(p,o)] = b[(p,o)] * 2
    let e[p,o] = stack[o](cos(2.5 * p), a[p,1])
    best[k] = argtop[p -> k](e[p,0])
    let u[t,d] = x[t,d]
    z[t,(p,o)] = u[t,(p,o)] * c[(p,o)] + u[t,(p,o)] * e[p,o]
    y[t,d] = z[t,d] + x[t,d] * sum[k](W[best[k]])
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    p, o = torch.arange(3).double()[:, None], torch.arange(2)
    a = 1.5 ** (p - o)
    e = torch.stack(((2.5 * p[:, 0]).cos(), a[:, 1]), -1)
    best = e[:, 0].argsort(descending=True)[:2]
    return x * (2 * a + e).flatten() + x * w["W"][best].sum()


# -- blocks ----------------------------------------------------------------------------------------

PIECES = """
block L[d] {
  index a : size(d)
  param A[d,a]
  def (x[t,d], b[t,d]) -> y[t,d] {
    z[t,a] = x[t,a] + b[t,a]
    turn[t,d] = cos(0.3 * position[t]) * (d + 1)
    y[t,d] = tanh(A[d,a] * z[t,a]) * turn[t,d] + x[t,d]
  }
}
block K[d] {
  index i : 0 .. 2
  param g[d]
  use inner[i] = L[d]
  def (x[t,d], b[t,d]) -> y[t,d] {
    u[t,d] = chain[i](inner, x[t,d], b[t,d])
    cached c[s,d] = u[t,d]
    let v[t,d] = sum[s](where(position[s] <= position[t], c[s,d], 0.0))
    y[t,d] = g[d] * v[t,d] / (position[t] + 1)
  }
}
model Own {
  index d : hidden, w : vocab
  const n = 4
  const dense = 0
  index a : 0 .. dense, b : dense .. 1, e : 1 .. n, y : n .. n, z : n .. n
  param embed[w,d]
  use layers[a] = L[d], layers[b] = K[d], layers[e] = L[d], layers[y] = L[d], layers[z] = K[d]
  use norm = RMSNorm[d]
  def main(token[t] of w) -> logits[t,w] {
    x[t,d] = embed[token[t], d]
    x1[t,d] = chain[a](layers, x[t,d], x[t,d])
    x2[t,d] = chain[b](layers, x1[t,d], x[t,d])
    x3[t,d] = chain[e](layers, x2[t,d], norm(x[t,d]))
    x4[t,d] = chain[y](layers, x3[t,d], x2[t,d])
    x5[t,d] = chain[z](layers, x4[t,d], x2[t,d])
    logits[t,w] = embed[w,d] * x5[t,d]
  }
  def states(token[t] of w) -> x3[t,d] {
    x[t,d] = embed[token[t], d]
    x2[t,d] = chain[b](layers, x[t,d], x[t,d])
    x3[t,d] = chain[e](layers, x2[t,d], x2[t,d])
  }
}
"""


def _layer(w: Weights, path: str, x: Tensor, b: Tensor) -> Tensor:
    turn = (0.3 * torch.arange(len(x)).double()).cos()[:, None] * torch.arange(1, 7)
    return ((x + b) @ w[f"{path}.A"].T).tanh() * turn + x


def _averaging(w: Weights, path: str, x: Tensor, b: Tensor) -> Tensor:
    for i in range(2):
        x = _layer(w, f"{path}.inner[{i}]", x, b)
    return w[f"{path}.g"] * x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]


def _states(w: Weights, token: Tensor) -> Tensor:
    x = w["embed"][token]
    x = b = _averaging(w, "layers[0]", x, x)
    for i in range(1, 4):
        x = _layer(w, f"layers[{i}]", x, b)
    return x


@whole("an array of blocks in five pieces, three of them empty", HEAD + PIECES, states=_states)
def _(w: Weights, token: Tensor) -> Tensor:
    first = w["embed"][token]
    x = _averaging(w, "layers[0]", first, first)
    for i in range(1, 4):
        x = _layer(w, f"layers[{i}]", x, norm(first, w["norm.gain"]))
    return x @ w["embed"].T


ENTRIES = """
block A[d] {
  index n : 3
  param K[n,d]  param O[d,n]
  def (x[t,d]) -> y[t,d] {
    cached k[s,n] = K[n,d] * x[t,d]
    let p[t,s] = softmax[s](where(position[s] <= position[t], (K[n,d] * x[t,d]) * k[s,n], -inf))
    y[t,d] = O[d,n] * (p[t,s] * k[s,n])
  }
  def twice(x[t,d]) -> y[t,d] { y[t,d] = x[t,d] * 2 }
  def square(x[d]) -> y[d] { y[d] = x[d] * x[d] }
}
model Own {
  index d : hidden, w : vocab
  param embed[w,d]
  use a = A[d]
  use norm = RMSNorm[d]
  def trunk(token[t] of w) -> h[t,d] { h[t,d] = norm(a(embed[token[t],d])) }
  def main(token[t] of w) -> logits[t,w] { logits[t,w] = embed[w,d] * trunk(token[t]) }
  def more(token[t] of w) -> h[t,d] { h[t,d] = a.square(a.twice(trunk(token[t]))) }
  def two(token[t] of w, after[t] = token[t + 1], last[t] = token[t + 2]) -> logits[t,w] {
    g[t,d] = trunk(token[t]) + embed[after[t],d] - embed[last[t],d]
    logits[t,w] = embed[w,d] * g[t,d]
  }
}
"""


def _trunk(w: Weights, token: Tensor) -> Tensor:
    x = w["embed"][token]
    k = x @ w["a.K"].T
    p = (k @ k.T).masked_fill(distance(x) < 0, -inf).softmax(-1)
    return norm(p @ k @ w["a.O"].T, w["norm.gain"])


def _two(w: Weights, token: Tensor) -> Tensor:
    embed = w["embed"]
    g = _trunk(w, token[:-2]) + embed[token[1:-1]] - embed[token[2:]]
    return g @ embed.T


@whole("entries that share a block, and see one and two tokens ahead", HEAD + ENTRIES,
       more=lambda w, token: (2 * _trunk(w, token)) ** 2, two=_two)  # fmt: skip
def _(w: Weights, token: Tensor) -> Tensor:
    return _trunk(w, token) @ w["embed"].T


@mixer("a block for one vector, called over heads, over parameters and along the history", """
  index h : 3, n : 4, f : 5
  param W[(h,n),d]  param G[h,n]  param K[n,d]  param O[d,(h,n)]
  use norm = RMSNorm[n]  use ff = SwiGLU[n,f]
""", """
    gain[h,n] = norm(G[h,n])
    q[t,h,n] = ff(W[(h,n),d] * x[t,d]) * gain[h,n]
    cached c[s,n] = K[n,d] * x[t,d]
    k[s,n] = norm(ff(c[s,n]))
    let p[t,h,s] = softmax[s](where(position[s] <= position[t], q[t,h,n] * k[s,n], -inf))
    let o[t,h,n] = p[t,h,s] * c[s,n]
    y[t,d] = O[d,(h,n)] * o[t,h,n]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    gain = norm(w["G"], w["norm.gain"])
    q = swiglu(w, "ff", (x @ w["W"].T).unflatten(-1, (3, 4))) * gain
    c = x @ w["K"].T
    k = norm(swiglu(w, "ff", c), w["norm.gain"])
    score = torch.einsum("thn,sn->ths", q, k)
    p = score.masked_fill((distance(x) < 0)[:, None], -inf).softmax(-1)
    return torch.einsum("ths,sn->thn", p, c).flatten(-2) @ w["O"].T
