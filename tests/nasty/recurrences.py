"""Hard models whose difficulty is in what they read of other tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.nasty.base import HEAD, Weights, mixer, whole


@mixer("a state of no index, that begins with a number", "", """
    scan total[t] = 0.5 * total[t-1] + mean[d](x[t,d]) from 0.3
    y[t,d] = x[t,d] * broadcast[d](total[t])
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    total, out = torch.tensor(0.3, dtype=x.dtype), []
    for row in x:
        total = 0.5 * total + row.mean()
        out.append(row * total)
    return torch.stack(out)


@mixer("a convolution said both ways, one with a stride of parameters", """
  index c : 3, one : 1
  param kernel[d, one, c]  param other[c, d]
  const last = size(c) - 1
""", """
    cached u[s,d] = x[t,d] * 2
    a[t,d] = kernel[d,0,c] * u[t+c-last,d]
    b[t,d] = other[c,d] * u[t-c,d]
    far[t,d] = u[t-5,d]
    y[t,d] = a[t,d] + b[t,d] * u[t-1,d] + far[t,d]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    u = torch.cat([torch.zeros(5, x.shape[1], dtype=x.dtype), 2 * x])
    out = []
    for t in range(len(x)):
        now = t + 5
        a = sum(w["kernel"][:, 0, c] * u[now + c - 2] for c in range(3))
        b = sum(w["other"][c] * u[now - c] for c in range(3))
        out.append(a + b * u[now - 1] + u[now - 5])
    return torch.stack(out)


@mixer("a history that attention and a shift read", "", """
    cached u[s,d] = x[t,d]
    let p[t,s] = softmax[s](where(position[s] <= position[t], x[t,d] * u[s,d], -inf))
    y[t,d] = p[t,s] * u[s,d] - u[t-2,d]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    scores = (x @ x.T).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    shifted = torch.cat([torch.zeros(2, x.shape[1], dtype=x.dtype), x])[: len(x)]
    return scores.softmax(-1) @ x - shifted


@mixer("a state in products and sums, read in parts", """
  index h : 2, n : 3, j : 2, hn = (h,n)
  param W[hn, d]  param V[j, d]  param first[hn|j]  param back[d, hn|j]
""", """
    let k[t,h,n] = W[(h,n),d] * x[t,d]
    let old[t,h]: f32 = max[n](S[t-1,(h,n)])
    let a[t,(h,n)]: f32 = 0.5 * S[t-1,(h,n)] + k[t,h,n] * sigmoid(old[t,h])
    let b[t,j]: f32 = S[t-1,j] * sum[h](old[t,h]) + V[j,d] * x[t,d]
    scan S[t,hn|j]: f32 = concat[hn|j](a[t,hn], tanh(b[t,j])) from first[hn|j]
    y[t,d] = back[d,hn|j] * S[t,hn|j]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    state, out = w["first"], []
    for row in x:
        grid = state[:6].reshape(2, 3)
        old = grid.amax(1)
        a = 0.5 * grid + (w["W"] @ row).reshape(2, 3) * old.sigmoid()[:, None]
        b = state[6:] * old.sum() + w["V"] @ row
        state = torch.cat([a.flatten(), b.tanh()])
        out.append(w["back"] @ state)
    return torch.stack(out)


@mixer("two scans, the second fed by the first, and positions", """
  param rate[d]
""", """
    scan A[t,d] = sigmoid(rate[d]) * A[t-1,d] + x[t,d] from 0
    scan B[t,d] = where(position[t] > 2, B[t-1,d] * 0.5, 1) + A[t,d] * A[t,d] from rate[d]
    y[t,d] = B[t,d] - A[t,d]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    a, b, out = torch.zeros(x.shape[1], dtype=x.dtype), w["rate"], []
    for t, row in enumerate(x):
        a = w["rate"].sigmoid() * a + row
        b = (0.5 * b if t > 2 else 1) + a * a
        out.append(b - a)
    return torch.stack(out)


@mixer("a delta rule with its dims in another order, and a query of three factors", """
  index h : 2, n : 3, i : 3, v : 4
  param K[(h,n), d]  param V[(v,h), d]  param B[h, d]  param back[d, (h,v)]  param turn[n, i]
""", """
    let k[t,h,n]: f32 = K[(h,n),d] * x[t,d] * 0.3
    let val[t,v,h] = V[(v,h),d] * x[t,d]
    let b[t,h]: f32 = sigmoid(B[h,d] * x[t,d])
    let wrong[t,v,h]: f32 = b[t,h] * k[t,h,i] * S[t-1,v,h,i] - val[t,v,h]
    scan S[t,v,h,n] = b[t,h] * S[t-1,v,h,n] - wrong[t,v,h] * k[t,h,n] from 0
    let q[t,h,n] = turn[n,i] * k[t,h,i] * b[t,h] * 2
    o[t,h,v] = q[t,h,n] * S[t,v,h,n]
    y[t,d] = back[d,(h,v)] * o[t,h,v] + x[t,d]
""")  # fmt: skip
def _(w: Weights, x: Tensor) -> Tensor:
    state, out = torch.zeros(4, 2, 3, dtype=x.dtype), []
    for row in x:
        k = 0.3 * (w["K"] @ row).reshape(2, 3)
        val, b = (w["V"] @ row).reshape(4, 2), (w["B"] @ row).sigmoid()
        said = b * torch.einsum("hi,vhi->vh", k, state)
        state = b[:, None] * state + (val - said)[..., None] * k
        q = 2 * b[:, None] * torch.einsum("ni,hi->hn", w["turn"], k)
        out.append(w["back"] @ torch.einsum("hn,vhn->hv", q, state).flatten() + row)
    return torch.stack(out)


@whole("a block with a state, lifted over heads whose name it has too", HEAD + """
block Memory[n](rate = 0.5) {
  index h : 2
  param W[h, n]
  def (x[t,n]) -> y[t,n] {
    cached u[s,n] = x[t,n]
    scan S[t,h,n]: f32 = rate * S[t-1,h,n] + W[h,n] * broadcast[h](u[t-1,n]) from 0
    y[t,n] = x[t,n] + sum[h](tanh(S[t,h,n]))
  }
}
model Own {
  index d : 6, w : vocab, h : 2, n : 3
  param embed[w,d]
  use near = Memory[n], far = Memory[n](rate = 0.9)
  def main(token[t] of w) -> logits[t,w] {
    x[t,d] = embed[token[t], d]
    z[t,h,n] = near(x[t,(h,n)])
    y[t,(h,n)] = far(z[t,h,n])
    logits[t,w] = embed[w,d] * y[t,d]
  }
  def last(token[t] of w) -> z[t,d] {
    scan Z[t,d] = 0.5 * Z[t-1,d] + embed[token[t], d] from 0
    z[t,d] = Z[t,d]
  }
}
""")  # fmt: skip
def _(w: Weights, token: Tensor) -> Tensor:
    def memory(x: Tensor, name: str, rate: float) -> Tensor:
        state, before, out = torch.zeros(2, 2, 3, dtype=x.dtype), torch.zeros_like(x[0]), []
        for row in x:
            state = rate * state + w[f"{name}.W"] * before[:, None]
            before = row
            out.append(row + state.tanh().sum(1))
        return torch.stack(out)

    x = w["embed"][token].reshape(-1, 2, 3)
    return memory(memory(x, "near", 0.5), "far", 0.9).flatten(1) @ w["embed"].T
