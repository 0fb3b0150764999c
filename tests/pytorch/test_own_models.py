"""Models that nobody prepared for: as emitted after every pass, they equal their source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from backends.pytorch.emit.module import emit
from compiler.pipeline import STAGES, compile_model
from tests.pytorch.running import Both

HEAD = """\
edition 2026
import std.norm
import std.rotary
index t : time, s : history t
const hidden = 12
const vocab = 20
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

SOURCES = {
    "a window over grouped heads, with biases and norms of queries and keys": """
const window = 4
block Mixer[d] {
  index g : 2, m : 3, n : 4
  param W_q[(g,m,n), d]  param b_q[(g,m,n)]  param W_kv[g, n|n2, d]  param W_o[d, (g,m,n)]
  index n2 : 4
  use q_norm = RMSNorm[n]
  def (x[t,d]) -> y[t,d] {
    q[t,g,m,n]      = rotary[n](q_norm(W_q[(g,m,n),d] * x[t,d] + b_q[(g,m,n)]), position[t])
    kv[t,g,n|n2]    = W_kv[g,n|n2,d] * x[t,d]
    cached k[s,g,n] = rotary[n](kv[t,g,n], position[t])
    cached v[s,g,n2] = kv[t,g,n2]
    let score[g,m,t,s]: f32 = q[t,g,m,n] * k[s,g,n] * 0.5
    let near[t,s]   = position[s] <= position[t] and position[t] - position[s] < window
    let p[g,m,t,s]: f32 = softmax[s](where(near[t,s], score[g,m,t,s], -inf))
    o[t,g,m,n2]     = p[g,m,t,s] * v[s,g,n2]
    y[t,d]          = W_o[d,(g,m,n)] * o[t,g,m,n]
  }
}""",
    "a score with a slope, and experts chosen by softmax": """
block Expert[d] {
  index f : 7
  param up[f,d]  param down[d,f]
  def (x[d]) -> y[d] {
    u[f] = tanh(up[f,d] * x[d])
    y[d] = down[d,f] * u[f]
  }
}
block Mixer[d] {
  index h : 3, n : 4, e : 5, k : 2
  param W_q[h, n, d]  param W_k[n, d]  param W_v[n, d]  param W_o[d, (h,n)]
  param slope[h]  param router[e, d]
  use expert[e] = Expert[d]
  def (x[t,d]) -> y[t,d] {
    q[t,h,n]         = W_q[h,n,d] * x[t,d]
    cached key[s,n]  = W_k[n,d] * x[t,d]
    cached value[s,n] = W_v[n,d] * x[t,d]
    let score[h,t,s]: f32 = q[t,h,n] * key[s,n] - slope[h] * (position[t] - position[s])
    let p[h,t,s]: f32 = softmax[s](where(position[s] <= position[t], score[h,t,s], -inf))
    o[t,h,n]         = p[h,t,s] * value[s,n]
    z[t,d]           = x[t,d] + W_o[d,(h,n)] * o[t,h,n]
    r[t,e]: f32      = softmax[e](router[e,d] * z[t,d])
    pick[t,k]        = argtop[e -> k](r[t,e])
    let routed[t,d]  = r[t,pick[t,k]] * expert[pick[t,k]](z[t,d])
    y[t,d]           = z[t,d] + routed[t,d]
  }
}""",
    "a cap on scores, a window and a sink for each head": """
const cap = 2.5
block Mixer[d] {
  index g : 2, m : 3, n : 4
  param W_q[(g,m,n), d]  param W_k[(g,n), d]  param W_v[(g,n), d]  param W_o[d, (g,m,n)]
  param sink[(g,m)]
  def (x[t,d]) -> y[t,d] {
    q[t,g,m,n]        = W_q[(g,m,n),d] * x[t,d]
    cached k[s,g,n]   = W_k[(g,n),d] * x[t,d]
    cached val[s,g,n] = W_v[(g,n),d] * x[t,d]
    let raw[g,m,t,s]: f32   = q[t,g,m,n] * k[s,g,n] * 0.5
    let near[t,s]           = position[s] <= position[t] and position[t] - position[s] < 3
    let score[g,m,t,s]: f32 = where(near[t,s], cap * tanh(raw[g,m,t,s] / cap), -inf)
    let high[g,m,t]: f32    = max(max[s](score[g,m,t,s]), sink[(g,m)])
    let e[g,m,t,s]: f32     = exp(score[g,m,t,s] - broadcast[s](high[g,m,t]))
    let p[g,m,t,s]: f32     = e[g,m,t,s] / (sum[s](e[g,m,t,s]) + exp(sink[(g,m)] - high[g,m,t]))
    o[t,g,m,n]              = p[g,m,t,s] * val[s,g,n]
    y[t,d]                  = W_o[d,(g,m,n)] * o[t,g,m,n]
  }
}""",
    "attention without a softmax": """
block Mixer[d] {
  index h : 3, n : 4, v : 5
  param W_q[(h,n), d]  param W_k[(h,n), d]  param W_v[(h,v), d]  param W_o[d, (h,v)]
  def (x[t,d]) -> y[t,d] {
    q[t,h,n]          = exp(W_q[(h,n),d] * x[t,d])
    cached k[s,h,n]   = exp(W_k[(h,n),d] * x[t,d])
    cached val[s,h,v] = W_v[(h,v),d] * x[t,d]
    let a[h,t,s]      = where(position[s] <= position[t], q[t,h,n] * k[s,h,n], 0.0)
    let total[h,t]    = sum[s](a[h,t,s])
    let share[h,t,s]  = a[h,t,s] / total[h,t]
    o[t,h,v]          = share[h,t,s] * val[s,h,v]
    let best[h,t]     = max[s](where(position[s] < position[t], a[h,t,s], -1.0))
    y[t,d]            = W_o[d,(h,v)] * (o[t,h,v] + broadcast[v](best[h,t]))
  }
}""",
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_model_of_ones_own(name: str, tmp_path: Path) -> None:
    file = tmp_path / "own.arch"
    file.write_text(HEAD + SOURCES[name] + TAIL)
    compiled = compile_model(str(file))
    source = compiled.after("elaborate")
    seen = []
    for stage in STAGES:
        program = compiled.after(stage)
        if program.bodies in seen:
            continue
        seen.append(program.bodies)
        both = Both(program, source)
        both.check("main", [5, 2, 7], [3, 4, 1], [0, 1, 2], [1, 1, 1])
        both.check("main", [6])
        both.check("main", [3, 1], cached=False)
    imported = re.search(r"runtime import ([^()]*?)\n\n|import \((.*?)\)", emit(program), re.DOTALL)
    assert imported
    names = re.findall(r"\w+", imported[1] or imported[2])
    code = re.sub(r"#.*", "", emit(program)[imported.end() :])
    assert all(re.search(rf"\b{name}\b", code) for name in names)
