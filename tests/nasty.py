"""Small models that are hard on a compiler, each with what it means, written out in plain torch.

A reference takes the weights by their paths (float64) and the tokens of one sequence and gives the
entry's result of a whole prompt. It is written from the language's rules alone: nothing of this
project computes in it.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, inf, sqrt

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
