"""elaborate: functions, blocks, arrays and entry points; the results against plain torch."""

from __future__ import annotations

import pytest
import torch
from elaborated import mistake, model, run

from compiler.interpret import CacheState

einsum = torch.einsum

# -- functions and blocks --------------------------------------------------------------------------


def test_functions_carry_what_they_do_not_name() -> None:
    body = "y[t,h,o,i] = swapped[i](scaled(2, x[t,h,o,i]))"  # o is a name inside swapped as well
    ran = run(model(body, "index o : 3, i : 4", "x[t,h,o,i]", "y[t,h,o,i]"))
    x = 2 * ran.x.unflatten(-1, (2, 2))
    ran.is_(torch.stack([x[..., 1], -x[..., 0]], -1).flatten(-2))
    ran = run(model("y[t,d,b] = outer[d,b](x[t,d], x[t,b])", "index b : 6", gives="y[t,d,b]"))
    ran.is_(einsum("td,tb->tdb", ran.x, ran.x))


def test_rotary_in_pairs_and_in_halves() -> None:
    angle = torch.arange(5.0)[:, None] * 10000.0 ** -(torch.arange(3.0) / 3)
    cos, sin = angle.cos(), angle.sin()
    ran = run(model("y[t,d] = rotary[d](x[t,d], position[t])"))
    a, b = ran.x[:, 0::2], ran.x[:, 1::2]
    wanted = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(1)
    torch.testing.assert_close(ran.y, wanted, rtol=1e-6, atol=1e-6)
    ran = run(model("y[t,d] = rotary_halves[d](x[t,d], position[t])"))
    a, b = ran.x.chunk(2, -1)
    wanted = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    torch.testing.assert_close(ran.y, wanted, rtol=1e-6, atol=1e-6)


def test_a_function_of_a_wide_argument_is_wide() -> None:
    ran = run(model("let u[t,d]: f32 = x[t,d] let v[t,d] = scaled(2, u[t,d]) y[t,d] = v[t,d]"))
    types = {n.label: n.type.dtype for n in ran.program.bodies["M.main"] if n.label}
    assert types["v"] == "f32"
    assert types["y"] == "act"


def test_blocks_are_lifted() -> None:
    body = "u[t,o,i] = 1 * x[t,o,i] y[t,o,e] = f(u[t,o,i])"  # o and i are names inside Linear
    ran = run(model(body, "index o : 2, i : 3 use f = Linear[e, i]", "x[t,o,i]", "y[t,o,e]"))
    ran.is_(ran.linear("f")(ran.x))
    body = "u[t,h,n] = x[t,(h,n)] y[t,h,n] = far(u[t,h,n])"
    ran = run(model(body, "use far = SoFar[n]", gives="y[t,h,n]"))
    ran.is_(ran.x.view(5, 2, 3).cumsum(0))


def test_settings_and_defs() -> None:
    source = """
      block Two[d](scale = 2, twice = true) {
        const wide = scale + 1
        index q : wide, z : scale * 2, c : size(d)
        param U[d, z]
        if twice { param V[z, d] } else { param V[z, d, q] param X[q, d] }
        def (x[d]) -> y[d] { y[d] = U[d,z] * inner(x[d]) }
        def inner(x[d]) -> y[z] {
          if twice { y[z] = V[z,d] * x[d] } else {
            let i[q] = X[q,c] * x[c]
            y[z] = V[z,d,q] * x[d] * i[q]
          }
        }
      }
      model M {
        index d : 6
        use a = Two[d]
        use b = Two[d](scale = 3, twice = false)
        def main(x[t,d]) -> y[t,d] { y[t,d] = b(a(x[t,d])) }
      }"""
    ran = run(source)
    w = ran.weights
    assert w["a.V"].shape == (4, 6)
    assert w["b.V"].shape == (6, 6, 4)
    x = ran.x @ w["a.V"].T @ w["a.U"].T
    ran.is_(einsum("zdq,td,tq->tz", w["b.V"], x, x @ w["b.X"].T) @ w["b.U"].T)


def test_arrays() -> None:
    uses = "index k : 2 param R[l, d] use f[l] = Linear[d, d]"
    ran = run(model("y[t,l,d] = f[l](x[t,d])", uses, gives="y[t,l,d]"))
    every = torch.stack([ran.linear(f"f[{i}]")(ran.x) for i in range(3)], 1)
    ran.is_(every)
    body = "pick[t,k] = argtop[l -> k](R[l,d] * x[t,d]) y[t,k,d] = f[pick[t,k]](x[t,d])"
    ran = run(model(body, uses, gives="y[t,k,d]"))
    best = (ran.x @ ran.weights["R"].T).topk(2).indices
    ran.is_(every[torch.arange(5)[:, None], best])


def test_arrays_in_pieces() -> None:
    members = "index a : 0 .. 1, z : 1 .. 3 use f[a] = SoFar[d], f[z] = Linear[d, d] param r[z]"
    body = """
      pick[i] = argtop[z -> i](r[z])
      index i : 1
      u[t,d] = chain[z](f, chain[a](f, x[t,d]))
      y[t,d] = u[t,d] + sum[i](f[pick[i]](x[t,d]))"""
    ran = run(model(body, members))
    one, two = ran.linear("f[1]"), ran.linear("f[2]")
    picked = (one, two)[int(ran.weights["r"].argmax())]
    ran.is_(two(one(ran.x.cumsum(0))) + picked(ran.x))


def test_chains_nest_and_may_be_empty() -> None:
    source = """
      block Deep[d](layers = 2) {
        index i : layers
        use f[i] = Linear[d, d]
        def (x[t,d], z[t,d]) -> y[t,d] { y[t,d] = chain[i](f, x[t,d]) + z[t,d] }
      }
      model M {
        index d : 6, l : 2
        use a[l] = Deep[d]
        use b = Deep[d](layers = 0)
        def main(x[t,d]) -> y[t,d] { y[t,d] = b(chain[l](a, x[t,d], x[t,d]), x[t,d]) }
      }"""
    ran = run(source)
    x = ran.x
    for layer in range(2):
        for i in range(2):
            x = ran.linear(f"a[{layer}].f[{i}]")(x)
        x = x + ran.x
    ran.is_(x + ran.x)


# -- entry points, caches --------------------------------------------------------------------------


def test_entry_points() -> None:
    source = """
      const ahead = false
      model M {
        index d : 6, w : 9
        param E[w, d]
        if ahead { def more(token[t] of w) -> y[t,d] { y[t,d] = E[token[t], d] } }
        def trunk(token[t] of w) -> h[t,d] { h[t,d] = E[token[t], d] }
        def main(token[t] of w) -> y[t,w] { y[t,w] = E[w,d] * trunk(token[t]) }
        def next(token[t] of w, one[t] = token[t + 1], two[t] = token[t + 2]) -> y[t,d] {
          y[t,d] = trunk(one[t]) - trunk(token[t]) * trunk(two[t])
        }
        def best(token[t] of w) -> y[t] of w {
          index i : 1
          p[t,i] = argtop[w -> i](E[w,d] * trunk(token[t]))
          y[t] = p[t,0]
        }
      }"""
    ran = run(source, "next")
    assert list(ran.program.entries) == ["main", "next", "best"]  # trunk is called
    rows = ran.weights["E"][ran.inputs["token"]]
    ran.is_(rows[1:4] - rows[:3] * rows[2:])
    run(source, "best").is_((rows @ ran.weights["E"].T).argmax(-1))
    assert "more" in run(source.replace("false", "true"), "more").program.entries


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def main(x[d]) -> y[d] { y[d] = x[d] }", "'main' runs over time"),
        ("def main(x[t,d]) -> y[t,d] { y[t,d] = f(f(x[t,d])) }", "'f' runs twice in one step"),
        (
            "def main(x[t,d]) -> y[t,d] { y[t,d] = chain[l](g, chain[l](g, x[t,d])) }",
            "'g[l]' runs twice in one step",
        ),
        ("def main(a[t] of d, b[t] = a[t - 1]) -> y[t] { y[t] = 0 }", "along time"),
        ("def main(a[t] of d, b[t] = a[d + 1]) -> y[t] { y[t] = 0 }", "along time"),
        ("def main(x[u,d]) -> y[u,d] { y[u,d] = x[u,d] } index u : time", "a second time axis"),
        (
            "def main(x[t,d]) -> y[t,d] { y[t,d] = x[t,d] }"
            "def more(x[t,d]) -> y[t,d] { y[t,d] = main(x[t,d]) }",
            "no other def can call it",
        ),
    ],
)
def test_entry_points_that_cannot_run(source: str, message: str) -> None:
    uses = "index d : 6, l : 2 use f = SoFar[d] use g[l] = SoFar[d]"
    assert message in mistake(f"model M {{ {uses} {source} }}")


def test_steps_equal_the_whole() -> None:
    """A short convolution and a decaying memory, both written as predicates on positions."""
    body = """
      cached u[s,d] = x[t,d]
      let tap[t,s,i] = where(position[t] - position[s] == i, 1, 0)
      mixed[t,d] = tap[t,s,i] * K[i,d] * u[s,d]
      let fade[t,s]: f32 = where(position[s] <= position[t], 0.5 ^ (position[t] - position[s]), 0)
      let memory[t,d,b] = fade[t,s] * u[s,d] * u[s,b]
      y[t,d] = mixed[t,d] + memory[t,d,b] * x[t,b]"""
    ran = run(model(body, "index i : 3, b : 6 param K[i, d]"))
    K, memory, rows = ran.weights["K"], torch.zeros(6, 6, dtype=torch.float64), []
    for t in range(5):
        mixed = sum(K[i] * ran.x[t - i] for i in range(min(t + 1, 3)))
        memory = memory / 2 + torch.outer(ran.x[t], ran.x[t])
        rows.append(mixed + memory @ ran.x[t])
    ran.is_(torch.stack(rows))
    state = CacheState()
    steps = [
        ran.interpreter.run("main", {"x": part}, state=state) for part in ran.x.split([2, 1, 2])
    ]
    torch.testing.assert_close(torch.cat(steps), ran.y)
