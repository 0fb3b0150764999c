"""elaborate: products, sums, subscripts and numbers; the results against plain torch."""

from __future__ import annotations

import pytest
import torch
from elaborated import mistake, model, run

from compiler.text import body_text

einsum = torch.einsum

# -- the graph -------------------------------------------------------------------------------------


def test_a_body_as_text() -> None:
    ran = run(model("let u[t,e]: f32 = W[e,d] * x[t,d]  y[t,e] = 2 * u[t,e]", gives="y[t,e]"))
    wanted = """\
  %x = input name="x" : act[t, d]
  %W = param param="W" : act[e, d]
  %wanted = select_rows(%x) : act[row, d]
  %1 = cast(%W) : f32[e, d]
  %2 = cast(%wanted) : f32[row, d]
  %u = contract(%1, %2) over=("d") : f32[row, e] as u
  %3 = constant value=2 : i64[]
  %4 = map(%3, %u) fn="mul" : f32[row, e]
  %y = cast(%4) : act[row, e] as y rounds
  return %y"""
    lines = body_text(ran.program.bodies["M.main"]).split("\n")
    found = [line.split("  //")[0] for line in lines if line.startswith("  %") or "return" in line]
    assert sorted(found) == sorted(wanted.split("\n"))


def test_layers_and_experts_stay_loops_and_arrays() -> None:
    source = model(
        "pick[t,k] = argtop[l -> k](R[l,d] * x[t,d]) u[t,d] = sum[k](f[pick[t,k]](x[t,d]))"
        "y[t,d] = chain[l](f, u[t,d])",
        "index k : 2 param R[l, d] use f[l] = Linear[d, d]",
    )
    ran = run(source)
    ops = [node.op for node in ran.program.bodies["M.main"]]
    assert ops.count("chain") == ops.count("apply") == 1
    more = run(source.replace("l : 3", "l : 300"))
    assert [node.op for node in more.program.bodies["M.main"]] == ops


# -- products, sums, subscripts --------------------------------------------------------------------


def test_products_of_indices() -> None:
    ran = run(model("y[t,n,h] = G[(h,n),d] * x[t,d]", gives="y[t,n,h]"))
    split = ran.weights["G"].view(2, 3, 6)
    ran.is_(einsum("hnd,td->tnh", split, ran.x))
    ran = run(model("y[t,(n,h)] = G[(h,n),d] * x[t,d]", gives="y[t,(n,h)]"))
    ran.is_(einsum("hnd,td->tnh", split, ran.x).flatten(1))
    ran = run(model("u[t,d] = 2 * x[t,d] y[t,n] = u[t,(1,n)] * u[t,(0,n)]", gives="y[t,n]"))
    u = 2 * ran.x.view(5, 2, 3)
    ran.is_(u[:, 1] * u[:, 0])


def test_parts_of_a_sum() -> None:
    body = "u[t,n|h] = P[n|h,d] * x[t,d] y[t,h] = u[t,h] + P[h,d] * x[t,d]"
    ran = run(model(body, gives="y[t,h]"))
    ran.is_(2 * ran.x @ ran.weights["P"][3:].T)
    fused = """
      u[t,q|v|f] = X[q|v|f,d] * x[t,d]
      let v2[t,v] = u[t,v]
      let f2[t,f] = u[t,f]
      y[t,q] = u[t,q] * v2[t,q] + f2[t,q]"""
    ran = run(model(fused, "index q : 2, v : 2, f : 2 param X[q|v|f, d]", gives="y[t,q]"))
    u = (ran.x @ ran.weights["X"].T).view(5, 3, 2)
    ran.is_(u[:, 0] * u[:, 1] + u[:, 2])
    nested = "y[t,e,h] = X[(e,h),d] * x[t,d]"
    ran = run(model(nested, "param X[(e, n|h), d]", gives="y[t,e,h]"))
    ran.is_((ran.x @ ran.weights["X"].T).view(5, 4, 5)[:, :, 3:])


def test_an_index_that_stands_for_others() -> None:
    body = "u[t,q] = p(x[t,d]) v[t,(h,n)] = 2 * u[t,(h,n)] y[t,d] = back(v[t,q])"
    uses = "index q = (h, n) use p = Linear[q, d] use back = Linear[d, q]"
    ran = run(model(body, uses))
    ran.is_(ran.linear("back")(2 * ran.linear("p")(ran.x)))
    body = "u[t,q] = p(x[t,d]) y[t,h] = u[t,h]"
    ran = run(model(body, "index q = n|h use p = Linear[q, d]", gives="y[t,h]"))
    ran.is_(ran.linear("p")(ran.x)[:, 3:])


def test_picks() -> None:
    body = "pick[t,k] = argtop[d -> k](x[t,d]) y[t,k,e] = W[e,pick[t,k]] * x[t,pick[t,k]]"
    ran = run(model(body, "index k : 2", gives="y[t,k,e]"))
    best = ran.x.topk(2)
    ran.is_(ran.weights["W"].T[best.indices] * best.values[..., None])


def test_groups_limit_picks() -> None:
    body = """
      a[t,h,n] = G[(h,n),d] * x[t,d]
      open[t,h] = in_top[h, 1](max[n](a[t,h,n]))
      pick[t,k] = argtop[e2 -> k](where(open[t,h], a[t,h,n], -inf))
      flat[t,(h,n)] = a[t,h,n]
      y[t,k] = flat[t,pick[t,k]]"""
    ran = run(model(body, "index e2 = (h, n), k : 2", gives="y[t,k]"))
    a = (ran.x @ ran.weights["G"].T).view(5, 2, 3)
    best = a.amax(-1).argmax(-1)
    ran.is_(a[range(5), best].topk(2).values)


def test_reading_with_indices_in_another_order() -> None:
    body = "let g[t,d,b] = x[t,d] * c[b] y[t,d,b] = g[t,b,d] * 2 + g[t,d,b]"
    ran = run(model(body, "index b : 6", gives="y[t,d,b]"))
    g = einsum("td,b->tdb", ran.x, ran.weights["c"])
    ran.is_(2 * g.transpose(1, 2) + g)


# -- what a term may lack --------------------------------------------------------------------------


def test_biases_and_distances_need_no_broadcast() -> None:
    body = """
      cached past[s,d] = x[t,d]
      let slope[h] = 2 ^ (h + 1) * r[h]
      let score[h,t,s] = past[s,d] * x[t,d] - slope[h] * (position[t] - position[s]) + r[h]
      y[t,h] = sum[s](where(position[s] <= position[t], score[h,t,s], 0))"""
    body = body.replace("past[s,d] * x[t,d]", "broadcast[h](past[s,d] * x[t,d])")
    ran = run(model(body, "param r[h]", gives="y[t,h]"))
    r, at = ran.weights["r"], torch.arange(5.0)
    score = einsum("sd,td->ts", ran.x, ran.x)
    slope = torch.tensor([2.0, 4.0]) * r
    score = score[None] - slope[:, None, None] * (at[:, None] - at[None]) + r[:, None, None]
    ran.is_(torch.tril(score).sum(-1).T)


def test_a_value_may_lack_nothing() -> None:
    assert "E0406" in mistake(model("y[t,d] = x[t,d] - mean[d](x[t,d])"))
    assert "E0406" in mistake(model("u[t,e] = W[e,d] * x[t,d] + c[d] y[t,d] = x[t,d]"))
    assert "E0406" in mistake(model("let u[t] = x[t,0] * c[0] y[t,d] = x[t,d] + u[t]"))


def test_scaling_is_no_contraction() -> None:
    body = "u[t,h,n] = G[(h,n),d] * x[t,d] y[t,h,n] = g[h,n] * u[t,h,n] * 6 ^ 0.5"
    ran = run(model(body, "param g[h, n]", gives="y[t,h,n]"))
    ran.is_((ran.x @ ran.weights["G"].T).view(5, 2, 3) * ran.weights["g"] * 6**0.5)
    assert "E0407" in mistake(model("y[t,e,d] = W[e,d] * x[t,d]", gives="y[t,e,d]"))


# -- numbers that the constants decide -------------------------------------------------------------


def test_extents_as_numbers() -> None:
    body = """
      index i : 3
      const last = size(d) - 1
      const two = if size(w) == 7 then 2 else 1
      y[t,d] = x[t,d] * size(i) * size(n) * two + broadcast[d](x[t,last])"""
    ran = run("index w : 7" + model(body))
    ran.is_(ran.x * 18 + ran.x[:, 5:])


@pytest.mark.parametrize(
    ("equations", "message"),
    [
        ("u[t,d] = x[t,d] * size(t)", "how long 't' is, only a run knows"),
        ("u[t,d] = x[t,d] * t", "'t' has no numbers of its own"),
        ("const q = 6 u[t] = x[t,q]", "'d' runs from 0 to 5, and this is 6"),
        ("index k : 7 u[t,k] = top[d -> k](x[t,d])", "cannot choose 7 of the 6"),
        ("const q = null u[t,d] = x[t,d] * q", "this is null, not a number"),
        ("v[t,h,n] = x[t,(h,n)] u[t,h,n] = swapped[n](v[t,h,n])", "'p' has extent 3 / 2"),
        ("v[t,d,i] = x[t,d] * x[t,i] u[t,d] = v[t,d,d] index i : 6", "'d' stands twice"),
        ("u[(t,h),n] = x[t,(h,n)]", "'t' is time: it cannot be part of another index"),
        ("u[d] = sum[t](x[t,d])", "nothing sums along 't'"),
        ("index b : 6 u[d,b] = x[t,d] * x[t,b]", "nothing sums along 't'"),
        ("cached v[s,d] = x[t,d] index k : 2 u[d,k] = argtop[s -> k](v[s,d])", "over a history"),
    ],
)
def test_what_has_no_number_is_refused(equations: str, message: str) -> None:
    assert message in mistake(model(f"{equations} y[t,d] = x[t,d]"))


def test_an_index_of_a_range_counts_as_it_is_declared() -> None:
    body = "y[t,z] = broadcast[z](x[t,0]) + z"
    ran = run(model(body, "index z : 2 .. 5", gives="y[t,z]"))
    ran.is_(ran.x[:, :1] + torch.tensor([2.0, 3.0, 4.0]))


def test_a_row_is_picked_by_a_number() -> None:
    members = "index m : 8 param place[m, d]"
    body = "let here[t,m] = where(m == position[t], 1, 0) y[t,d] = x[t,d] + here[t,m] * place[m,d]"
    ran = run(model(body, members))
    ran.is_(ran.x + ran.weights["place"][:5])
    found = mistake(model("y[t,d] = x[t,d] + place[position[t],d]", members))
    assert "where(m == position[t], 1, 0), times the value" in found
