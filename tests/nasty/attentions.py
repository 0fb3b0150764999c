"""Hard models whose difficulty is in what is read along the history."""

from __future__ import annotations

import cmath
from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from tests.nasty.base import (
    ATTENTION,
    Weights,
    attended,
    attention,
    distance,
    mixer,
    norm,
    softmax,
)

PLAIN = "q[t,h,n] * k[s,h,n] * 0.7"


@mixer("the past alone, some rows see nothing", ATTENTION,
       attention(PLAIN, "position[t] - position[s] >= 3"))  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    return attended(w, x, distance(x) >= 3)


@mixer("the future alone", ATTENTION, attention(PLAIN, "position[s] >= position[t]"))
def _(w: Weights, x: Tensor) -> Tensor:
    return attended(w, x, distance(x) <= 0)


@mixer("the far future alone", ATTENTION,
       attention(PLAIN, "position[t] - position[s] < 0 - 2"))  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    return attended(w, x, distance(x) < -2)


@mixer("a band on both sides", ATTENTION, attention(
    PLAIN, "position[t] - position[s] < 3 and position[s] - position[t] < 2"
))  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    return attended(w, x, (distance(x) < 3) & (distance(x) > -2))


@mixer("a window and a sink", ATTENTION, attention(
    PLAIN,
    "position[s] <= position[t] and (position[t] - position[s] < 2 or position[s] < 1)",
))  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    first = torch.arange(len(x)) < 1
    return attended(w, x, (distance(x) >= 0) & ((distance(x) < 2) | first))


def sunk(w: Weights, x: Tensor, seen: Tensor, bent: Callable[[Tensor], Tensor]) -> Tensor:
    """Scores that a function bends, beside one more logit of each head."""
    q, k = ((x @ w[name].T).unflatten(-1, (3, 4)) for name in ("W_q", "W_k"))
    score = bent(torch.einsum("thn,shn->hts", q, k) * 0.7).masked_fill(~seen, -inf)
    sink = w["slope"][:, None, None].expand(-1, len(x), 1)
    p = torch.cat((score, sink), -1).softmax(-1)[..., :-1]
    value = (x @ w["W_v"].T).unflatten(-1, (3, 5))
    return x + torch.einsum("hts,shv->thv", p, value).flatten(-2) @ w["W_o"].T


SUNK = """
    q[t,h,n]          = W_q[(h,n),d] * x[t,d]
    cached k[s,h,n]   = W_k[(h,n),d] * x[t,d]
    cached val[s,h,v] = W_v[(h,v),d] * x[t,d]
    let raw[h,t,s]: f32   = q[t,h,n] * k[s,h,n] * 0.7
    let score[h,t,s]: f32 = {score}
    let high[h,t]: f32    = {high}
    let e[h,t,s]: f32     = exp(score[h,t,s] - broadcast[s](high[h,t]))
    let p[h,t,s]: f32     = e[h,t,s] / (exp(slope[h] - high[h,t]) + sum[s](e[h,t,s]))
    o[t,h,v]          = p[h,t,s] * val[s,h,v]
    y[t,d]            = x[t,d] + W_o[d,(h,v)] * o[t,h,v]
"""


@mixer("a soft cap and a logit of no position, some rows see nothing", ATTENTION, SUNK.format(
    score="where(position[t] - position[s] >= 3, 1.5 * tanh(raw[h,t,s] / 1.5), -inf)",
    high="max(max[s](score[h,t,s]), slope[h])",
))  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    return sunk(w, x, distance(x) >= 3, lambda score: 1.5 * (score / 1.5).tanh())


@mixer("a score that is read twice, and a logit beside it with any shift", ATTENTION, SUNK.format(
    score="where(position[s] > position[t], -inf, raw[h,t,s] * sigmoid(2 * raw[h,t,s]) + 0.25)",
    high="slope[h] * position[t] / (position[t] + 1)",
))  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    return sunk(w, x, distance(x) >= 0, lambda score: score * (2 * score).sigmoid() + 0.25)


@mixer("a slope for each head", ATTENTION, attention(
    PLAIN + " - slope[h] * (position[t] - position[s])", "position[s] <= position[t]"
))  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    return attended(w, x, distance(x) >= 0, -w["slope"][:, None, None] * distance(x))


@mixer("a reach that the model learns", ATTENTION, attention(
    PLAIN, "position[t] - position[s] <= 2 * slope[h] and position[s] <= position[t]"
))  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    near = distance(x) <= 2 * w["slope"][:, None, None]
    return attended(w, x, near & (distance(x) >= 0))


@mixer("latent keys with a shared part, everything visible", """
  index h : 7, n : 5, v : 3, r : 11, j : 2
  param D[r,d]  param R[j,d]  param W[(h,n|j),d]
  param U[(h,n),r]  param V[(h,v),r]  param O[d,(h,v)]
""", """
    cached c[s,r] = D[r,d] * x[t,d]
    cached kr[s,j] = R[j,d] * x[t,d]
    q[t,h,n|j] = W[(h,n|j),d] * x[t,d]
    let kn[s,h,n] = U[(h,n),r] * c[s,r]
    let k[s,h,n|j] = concat[n|j](kn[s,h,n], broadcast[h](kr[s,j]))
    let score[h,t,s]: f32 = q[t,h,n|j] * k[s,h,n|j] * 0.3
    let p[h,t,s]: f32 = softmax[s](score[h,t,s])
    let val[s,h,v] = V[(h,v),r] * c[s,r]
    let o[t,h,v] = p[h,t,s] * val[s,h,v]
    y[t,d] = O[d,(h,v)] * o[t,h,v]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    latent, shared = x @ w["D"].T, x @ w["R"].T
    q = (x @ w["W"].T).unflatten(-1, (7, 7))
    kn = (latent @ w["U"].T).unflatten(-1, (7, 5))
    k = torch.cat((kn, shared[:, None].expand(-1, 7, -1)), -1)
    value = (latent @ w["V"].T).unflatten(-1, (7, 3))
    p = (torch.einsum("thn,shn->hts", q, k) * 0.3).softmax(-1)
    return torch.einsum("hts,shv->thv", p, value).flatten(-2) @ w["O"].T


@mixer("heads that talk to one another", """
  index h : 3, g : 2, n : 4
  param Q[(h,n),d]  param K[n,d]  param M[g,h]  param V[g,n,d]  param O[d,(g,n)]
""", """
    q[t,h,n] = Q[(h,n),d] * x[t,d]
    cached k[s,n] = K[n,d] * x[t,d]
    cached v[s,g,n] = V[g,n,d] * x[t,d]
    let raw[h,t,s]: f32 = q[t,h,n] * k[s,n]
    let mixed[g,t,s]: f32 = M[g,h] * raw[h,t,s]
    let p[g,t,s]: f32 = softmax[s](where(position[s] <= position[t], mixed[g,t,s], -inf))
    let o[t,g,n] = p[g,t,s] * v[s,g,n]
    y[t,d] = O[d,(g,n)] * o[t,g,n]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    q = (x @ w["Q"].T).unflatten(-1, (3, 4))
    raw = torch.einsum("thn,sn->hts", q, x @ w["K"].T)
    mixed = torch.einsum("gh,hts->gts", w["M"], raw)
    p = mixed.masked_fill(distance(x) < 0, -inf).softmax(-1)
    value = torch.einsum("gnd,sd->sgn", w["V"], x)
    return torch.einsum("gts,sgn->tgn", p, value).flatten(-2) @ w["O"].T


@mixer("a branch around a chain that has one order for any number of positions", """
  index h : 5, g : 3, m : 1, r : 3
  param C[r,d]  param K[g,h,r]  param V[m,r]  param Q[g,h,d]  param O[d,m,h]
""", """
    cached c[s,r] = C[r,d] * x[t,d]
    let k[g,s,h]: f32 = K[g,h,r] * c[s,r]
    let v[s,m]: f32 = V[m,r] * c[s,r]
    let q[g,t,h] = Q[g,h,d] * x[t,d]
    let score[h,t,s]: f32 = k[g,s,h] * q[g,t,h] * 0.3
    let p[s,h,t]: f32 = softmax[s](0.7 * where(position[t] > position[s], score[h,t,s], -inf))
    let o[m,h,t]: f32 = p[s,h,t] * v[s,m]
    y[t,d] = O[d,m,h] * o[m,h,t]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    c = x @ w["C"].T
    k, q = torch.einsum("ghr,sr->gsh", w["K"], c), torch.einsum("ghd,td->gth", w["Q"], x)
    score = torch.einsum("gsh,gth->hts", k, q) * 0.21
    p = softmax(score.masked_fill(distance(x) <= 0, -inf))
    return torch.einsum("hts,sr,mr,dmh->td", p, c, w["V"], w["O"])


@mixer("an index called as a runtime calls the batch", """
  index a : 2, b : 3, c : 4
  param K[c,d]  param V[b,d]  param Q[a,c,d]  param O[d,a,b]
""", """
    cached k[s,c] = K[c,d] * x[t,d]
    cached v[s,b] = V[b,d] * x[t,d]
    q[t,a,c] = Q[a,c,d] * x[t,d]
    let p[a,t,s]: f32 = softmax[s](where(position[s] <= position[t], q[t,a,c] * k[s,c], -inf))
    o[t,a,b] = p[a,t,s] * v[s,b]
    y[t,d] = O[d,a,b] * o[t,a,b]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    score = torch.einsum("acd,td,ce,se->ats", w["Q"], x, w["K"], x)
    p = score.masked_fill(distance(x) < 0, -inf).softmax(-1)
    return torch.einsum("ats,be,se,dab->td", p, w["V"], x, w["O"])


@mixer("one score under two softmaxes", """
  index n : 4
  param W[n,d]  param Q[n,d]  param O[d,n]
""", """
    cached k[s,n] = W[n,d] * x[t,d]
    let score[t,s] = (Q[n,d] * x[t,d]) * k[s,n]
    let p[t,s] = softmax[s](where(position[s] <= position[t], score[t,s], -inf))
    let r[t,s] = softmax[s](where(position[s] < position[t], score[t,s] * 2, -inf))
    y[t,d] = O[d,n] * ((p[t,s] - 0.5 * r[t,s]) * k[s,n])
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    k, gap = x @ w["W"].T, distance(x)
    score = x @ w["Q"].T @ k.T
    p = softmax(score.masked_fill(gap < 0, -inf))
    r = softmax((score * 2).masked_fill(gap <= 0, -inf))
    return (p - 0.5 * r) @ k @ w["O"].T


@mixer("a norm of every pair of positions", """
  index n : 4
  param W[n,d]  param Q[n,d]  param O[d,n]  use norm = RMSNorm[n]
""", """
    cached c[s,n] = W[n,d] * x[t,d]
    q[t,n] = Q[n,d] * x[t,d]
    let pair[t,s,n] = q[t,n] * c[s,n]
    z[t,s,n] = norm(pair[t,s,n])
    let score[t,s] = sum[n](z[t,s,n])
    let p[t,s] = softmax[s](where(position[s] <= position[t], score[t,s], -inf))
    y[t,d] = O[d,n] * (p[t,s] * c[s,n])
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    c, q = x @ w["W"].T, x @ w["Q"].T
    score = norm(q[:, None] * c, w["norm.gain"]).sum(-1)
    return score.masked_fill(distance(x) < 0, -inf).softmax(-1) @ c @ w["O"].T


@mixer("reductions along the history", """
  index n : 4
  param W[n,d]  param O[d,n]  param P[d,n]
""", """
    cached c[s,n] = W[n,d] * x[t,d]
    cached total[s] = sum[n](W[n,d] * x[t,d])
    let a[t] = max[s](where(position[s] <= position[t], total[s], -9.0))
    let b[t,n] = sum[s](where(position[s] < position[t], c[s,n], 0.0)) / (position[t] + 1)
    let e[t,n] = min[s](where(position[s] + 2 > position[t], c[s,n], 5.0))
    let v[n] = mean[s](c[s,n])
    let u = max[s](total[s])
    y[t,d] = O[d,n] * (b[t,n] + e[t,n]) + P[d,n] * v[n] * a[t] + x[t,d] * u
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    # W[n,d] * x[t,d] under sum[n] sums d, and then n.
    c, gap = x @ w["W"].T, distance(x)
    total = c.sum(-1)
    a = torch.where(gap >= 0, total, -9.0).amax(-1, keepdim=True)
    before = (gap > 0).double() @ c / (torch.arange(len(x))[:, None] + 1)
    e = torch.where((gap < 2)[..., None], c, 5.0).amin(1)
    v = c.mean(0)
    return (before + e) @ w["O"].T + a * (w["P"] @ v) + x * total.max()


@mixer("rotary embeddings of both kinds, before the cache and after it", """
  index n : 4
  param Q[n,d]  param K[n,d]  param O[d,n]
""", """
    q[t,n] = rotary[n](Q[n,d] * x[t,d], position[t])
    cached k[s,n] = rotary_halves[n](K[n,d] * x[t,d], position[t])
    cached raw[s,n] = K[n,d] * x[t,d]
    let kk[s,n] = rotary[n](raw[s,n], position[s])
    let score[t,s]: f32 = q[t,n] * kk[s,n] + q[t,n] * k[s,n]
    let p[t,s]: f32 = softmax[s](where(position[s] <= position[t], score[t,s], -inf))
    y[t,d] = O[d,n] * (p[t,s] * raw[s,n])
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    def turned(z: Tensor, halves: bool) -> Tensor:
        out = z.clone()
        for at in range(len(z)):
            for p in range(2):
                angle = at / 10000.0 ** (p / 2)
                i, j = (p, p + 2) if halves else (2 * p, 2 * p + 1)
                both = torch.complex(z[at, i], z[at, j])
                both = both * torch.tensor(cmath.rect(1, angle), dtype=both.dtype)
                out[at, i], out[at, j] = both.real, both.imag
        return out

    q, raw = x @ w["Q"].T, x @ w["K"].T
    score = turned(q, False) @ (turned(raw, False) + turned(raw, True)).T
    return score.masked_fill(distance(x) < 0, -inf).softmax(-1) @ raw @ w["O"].T


# -- choosing --------------------------------------------------------------------------------------
