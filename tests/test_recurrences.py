"""Recurrences of other papers, each a block of equations, beside a loop in plain torch.

Nothing is built for any of them: gated linear attention, a decay that is a constant, the delta
rule, a diagonal state-space model, a recurrent network with a matrix in its loop, and an LSTM whose
one state holds two vectors.
"""

import json
from itertools import pairwise

import pytest
import torch

import dslc
from compiler.equivalence import equivalent
from compiler.interpret import CacheState, Interpreter
from compiler.pipeline import STAGES, compile_model
from oracle.compare import assert_equal

MODEL = """
index t : time, s : history t

{block}

model Small {{
  index d : 6, w : 31, l : 2
  param embed[w, d]
  use layer[l] = Mix[d]

  def main(token[t] of w) -> logits[t,w] {{
    x[t,d]      = chain[l](layer, embed[token[t], d])
    logits[t,w] = embed[w,d] * x[t,d]
  }}
}}
"""
GATED = """
# Yang et al. 2023 (arXiv:2312.06635): each column of the memory decays as the token says.
block Mix[d] {
  index h : 3, n : 4, v : 5
  param W_q[(h,n), d]
  param W_k[(h,n), d]
  param W_v[(h,v), d]
  param W_a[(h,n), d]
  param W_o[d, (h,v)]
  def (x[t,d]) -> y[t,d] {
    q[t,h,n]   = W_q[(h,n),d] * x[t,d]
    k[t,h,n]   = W_k[(h,n),d] * x[t,d]
    val[t,h,v] = W_v[(h,v),d] * x[t,d]
    let keep[t,h,n]: f32 = sigmoid(W_a[(h,n),d] * x[t,d])
    scan S[t,h,n,v] = keep[t,h,n] * S[t-1,h,n,v] + k[t,h,n] * val[t,h,v] from 0
    o[t,h,v]   = q[t,h,n] * S[t,h,n,v]
    y[t,d]     = x[t,d] + W_o[d,(h,v)] * o[t,h,v]
  }
}
"""
RETENTION = """
# Sun et al. 2023 (arXiv:2307.08621): heads that forget at fixed rates.
block Mix[d] {
  index h : 3, n : 4, v : 5
  param W_q[(h,n), d]
  param W_k[(h,n), d]
  param W_v[(h,v), d]
  param W_o[d, (h,v)]
  def (x[t,d]) -> y[t,d] {
    q[t,h,n]   = W_q[(h,n),d] * x[t,d]
    k[t,h,n]   = W_k[(h,n),d] * x[t,d]
    val[t,h,v] = W_v[(h,v),d] * x[t,d]
    let rate[h] = 1 - 2.0 ^ (-5 - h)
    scan S[t,h,n,v] = rate[h] * S[t-1,h,n,v] + k[t,h,n] * val[t,h,v] from 0
    y[t,d]     = x[t,d] + W_o[d,(h,v)] * q[t,h,n] * S[t,h,n,v]
  }
}
"""
DELTA = """
# Schlag et al. 2021 (arXiv:2102.11174), equation 24: a value is replaced by another.
block Mix[d] {
  index n : 4, i : 4, v : 5
  param W_q[n, d]
  param W_k[n, d]
  param W_v[v, d]
  param w_b[d]
  param W_o[d, v]
  def (x[t,d]) -> y[t,d] {
    let q[t,n]: f32   = W_q[n,d] * x[t,d]
    let long[t,n]: f32 = W_k[n,d] * x[t,d]
    let k[t,n]: f32   = long[t,n] / (sum[n](abs(long[t,n])) + 0.1)
    let val[t,v]: f32 = W_v[v,d] * x[t,d]
    let b[t]: f32     = sigmoid(w_b[d] * x[t,d])
    scan S[t,v,n] = S[t-1,v,n] - b[t] * (k[t,i] * S[t-1,v,i] - val[t,v]) * k[t,n] from 0
    o[t,v] = q[t,n] * S[t,v,n]
    y[t,d] = x[t,d] + W_o[d,v] * o[t,v]
  }
}
"""
STATE_SPACE = """
# Gu and Dao 2023 (arXiv:2312.00752), algorithm 2, without its convolution.
block Mix[d] {
  index n : 4
  param A_log[d, n]
  param W_b[n, d]
  param W_c[n, d]
  param W_dt[d]
  param skip[d]
  def (x[t,d]) -> y[t,d] {
    let b[t,n]: f32  = W_b[n,d] * x[t,d]
    let c[t,n]: f32  = W_c[n,d] * x[t,d]
    let dt[t,d]: f32 = log(1 + exp(W_dt[d] * x[t,d]))
    scan H[t,d,n] = exp(-dt[t,d] * exp(A_log[d,n])) * H[t-1,d,n] + dt[t,d] * b[t,n] * x[t,d] from 0
    y[t,d] = c[t,n] * H[t,d,n] + skip[d] * x[t,d]
  }
}
"""
ELMAN = """
# Elman 1990: the state goes through a matrix. It begins with what is learned.
block Mix[d] {
  index n : 7, m : 7
  param U[n, m]
  param W[n, d]
  param V[d, n]
  param first[n]
  def (x[t,d]) -> y[t,d] {
    scan H[t,n]: act = tanh(U[n,m] * H[t-1,m] + W[n,d] * x[t,d]) from first[n]
    y[t,d] = x[t,d] + V[d,n] * H[t,n]
  }
}
"""
LSTM = """
# Hochreiter and Schmidhuber 1997, with a forget gate: cell and output are one state.
block Mix[d] {
  index n : 5, j : 5, g : 4
  param W[(g,n), d]
  param U[(g,n), j]
  param V[d, n]
  def (x[t,d]) -> y[t,d] {
    let z[t,g,n]: f32  = W[(g,n),d] * x[t,d] + U[(g,n),j] * S[t-1,j]
    let new[t,n]: f32  = sigmoid(z[t,0,n]) * S[t-1,n] + sigmoid(z[t,1,n]) * tanh(z[t,2,n])
    let out[t,j]: f32  = sigmoid(z[t,3,j]) * tanh(new[t,j])
    scan S[t,n|j]: f32 = concat[n|j](new[t,n], out[t,j]) from 0
    y[t,d] = x[t,d] + V[d,n] * S[t,n]
  }
}
"""


def heads(w, x, name, width):
    return (x @ w[name].T).unflatten(-1, (3, width))


def gated(w, x):
    q, k, v = heads(w, x, "W_q", 4), heads(w, x, "W_k", 4), heads(w, x, "W_v", 5)
    keep, S, out = heads(w, x, "W_a", 4).sigmoid(), torch.zeros(3, 4, 5), []
    for t in range(len(x)):
        S = keep[t][..., None] * S + k[t][..., None] * v[t][:, None]
        out.append(torch.einsum("hn,hnv->hv", q[t], S).flatten())
    return x + torch.stack(out) @ w["W_o"].T


def retention(w, x):
    q, k, v = heads(w, x, "W_q", 4), heads(w, x, "W_k", 4), heads(w, x, "W_v", 5)
    rate = 1 - 2.0 ** -torch.arange(5.0, 8.0)
    # The paper's parallel form, not the recurrence.
    past = torch.arange(len(x))[:, None] - torch.arange(len(x))
    decay = torch.where(past >= 0, rate[:, None, None] ** past.clamp(min=0), 0)
    scores = torch.einsum("thn,shn->hts", q, k) * decay
    return x + torch.einsum("hts,shv->thv", scores, v).flatten(1) @ w["W_o"].T


def delta(w, x):
    q, k, v, b = x @ w["W_q"].T, x @ w["W_k"].T, x @ w["W_v"].T, (x @ w["w_b"]).sigmoid()
    k = k / (k.abs().sum(-1, keepdim=True) + 0.1)
    S, out = torch.zeros(5, 4), []
    for t in range(len(x)):
        S = S + b[t] * torch.outer(v[t] - S @ k[t], k[t])
        out.append(S @ q[t])
    return x + torch.stack(out) @ w["W_o"].T


def state_space(w, x):
    b, c, dt = x @ w["W_b"].T, x @ w["W_c"].T, torch.nn.functional.softplus(w["W_dt"] * x)
    H, out = torch.zeros(x.shape[1], 4), []
    for t in range(len(x)):
        kept = torch.exp(-dt[t][:, None] * w["A_log"].exp())
        H = kept * H + (dt[t] * x[t])[:, None] * b[t]
        out.append(H @ c[t])
    return torch.stack(out) + w["skip"] * x


def elman(w, x):
    network = torch.nn.RNN(x.shape[1], 7, batch_first=True, bias=False)
    with torch.no_grad():
        network.weight_hh_l0.copy_(w["U"])
        network.weight_ih_l0.copy_(w["W"])
    return x + network(x[None], w["first"][None, None])[0][0] @ w["V"].T


def lstm(w, x):
    h, c, out = torch.zeros(5), torch.zeros(5), []
    for t in range(len(x)):
        f, i, g, o = (w["W"] @ x[t] + w["U"] @ h).unflatten(0, (4, 5))
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(c)
    return x + torch.stack(out) @ w["V"].T


BLOCKS = {
    "gated": (GATED, gated),
    "retention": (RETENTION, retention),
    "delta": (DELTA, delta),
    "state_space": (STATE_SPACE, state_space),
    "elman": (ELMAN, elman),
    "lstm": (LSTM, lstm),
}


class Case:
    def __init__(self, name, folder):
        text, self.layer = BLOCKS[name]
        self.path = folder / f"{name}.arch"
        self.path.write_text(MODEL.format(block=text))
        dslc.compile(str(self.path)).save(str(folder / name))
        self.model = dslc.load(str(folder / name), seed=3)
        generator = torch.Generator().manual_seed(5)
        self.sequences = [torch.randint(31, (n,), generator=generator) for n in (13, 5, 8)]
        self.long = torch.randint(31, (147,), generator=generator)

    @torch.no_grad()
    def expected(self, tokens):
        weights = {n: p.detach() for n, p in self.model.named_parameters()}
        x = weights["embed"][tokens]
        for layer in range(2):
            prefix = f"layer.{layer}."
            own = {n.removeprefix(prefix): p for n, p in weights.items() if n.startswith(prefix)}
            x = self.layer(own, x)
        return x @ weights["embed"].T


@pytest.fixture(scope="module", params=BLOCKS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("recurrence"))


def test_a_sequence_and_a_ragged_batch(case):
    expected = [case.expected(s) for s in case.sequences]
    for tokens, wanted in zip(case.sequences, expected, strict=True):
        assert_equal(case.model(tokens[None])[0], wanted)
    tokens = torch.nn.utils.rnn.pad_sequence(case.sequences, batch_first=True, padding_value=7)
    logits = case.model(tokens, torch.tensor([13, 5, 8]))
    for row, wanted in zip(logits, expected, strict=True):
        assert_equal(row[: len(wanted)], wanted)


def test_a_long_sequence(case):
    """Of several chunks, where many tokens are computed at once."""
    assert_equal(case.model(case.long[None])[0], case.expected(case.long))
    cache = case.model.new_cache(1)
    rows = [case.model(part[None], cache=cache)[0] for part in case.long.split(70)]
    assert_equal(torch.cat(rows), case.expected(case.long))


def test_steps_of_any_length_and_sequences_that_sit_out(case):
    """A state goes on where its sequence was, whatever others did meanwhile."""
    cache, at = case.model.new_cache(3), [0, 0, 0]
    found = [[], [], []]
    for counts in ((4, 1, 0), (0, 2, 5), (1, 1, 1), (8, 0, 1), (0, 1, 1)):
        tokens = torch.full((3, max(counts)), 11)
        for i, n in enumerate(counts):
            tokens[i, :n] = case.sequences[i][at[i] : at[i] + n]
        logits = case.model(tokens, torch.tensor(counts), cache=cache)
        for i, n in enumerate(counts):
            found[i].append(logits[i, :n])
            at[i] += n
    for rows, tokens in zip(found, case.sequences, strict=True):
        assert_equal(torch.cat(rows), case.expected(tokens))


def test_a_slot_that_is_emptied_begins_anew(case):
    cache = case.model.new_cache(2)
    case.model(torch.stack([case.sequences[0][:6], case.sequences[2][:6]]), cache=cache)
    cache.truncate([0, 6])
    tokens = torch.stack([case.sequences[1], case.sequences[1]])
    logits = case.model(tokens, torch.tensor([5, 0]), cache=cache)
    assert_equal(logits[0], case.expected(case.sequences[1]))
    with pytest.raises(ValueError) as error:
        cache.truncate([3, 6])
    [path] = {p for p in cache.paths() if p.startswith("layer.0")}
    assert str(error.value) == (
        f"slot 0 cannot end at 3 of its 5 positions: '{path}' is a state, kept as it is after the "
        "last one"
    )
    assert cache.lengths == [5, 6]


def test_a_conversation_goes_on_where_it_was_or_from_the_start(case):
    """A state cannot be taken back: where less than all of it is wanted, it is made anew."""
    cache, first = case.model.new_cache(1), case.sequences[1][None]

    def both(tokens):
        expected = case.model.generate(tokens, max_new_tokens=4)
        assert torch.equal(case.model.generate(tokens, max_new_tokens=4, cache=cache), expected)
        return expected

    said = both(first)
    both(torch.cat([said, case.sequences[2][None]], 1))  # all that is held, and more
    both(torch.cat([first, case.sequences[2][None]], 1))  # less
    both(first)


def test_a_cache_of_fixed_capacity_refuses_more(case):
    cache = case.model.new_cache(1, capacity=6)
    case.model(case.sequences[1][None], cache=cache)
    with pytest.raises(ValueError, match="made for 6 positions per sequence, and 7 are needed"):
        case.model(case.sequences[1][None, :2], cache=cache)


def test_a_step_that_fails_leaves_no_trace(case, monkeypatch):
    cache, tokens = case.model.new_cache(1), case.sequences[0][None]
    case.model(tokens[:, :5], cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr("backends.pytorch.model.unpacked", None)
        patch.setattr("backends.pytorch.runtime.step.Step.commit", lambda step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            case.model(tokens[:, 5:9], cache=cache)
    assert_equal(case.model(tokens[:, 5:], cache=cache)[0], case.expected(tokens[0])[5:])


def test_the_interpreter_agrees_with_its_states_along_time(case):
    compiled = compile_model(str(case.path))
    program = compiled.after("elaborate")
    weights = {
        row.path.format(*place): tensor
        for row in case.model.manifest.parameters
        for place, tensor in _stored(case.model, row)
    }
    interpreter, state = Interpreter(program, weights), CacheState()
    tokens, rows = case.sequences[0], []
    for start, stop in ((0, 4), (4, 5), (5, 13)):
        rows.append(interpreter.run("main", {"token": tokens[start:stop]}, state=state))
    assert_equal(torch.cat(rows), case.expected(tokens))
    trace: dict = {}
    interpreter.run("main", {"token": tokens}, trace=trace)
    traced = [k for k in trace if k.startswith("layer[0]")]
    assert all(len(trace[k]) == 13 for k in traced if not k.endswith("rate"))
    if case.layer is lstm:  # what belongs to the scan is traced like the rest
        cell, out = trace["layer[0].new"], trace["layer[0].out"]
        assert torch.equal(trace["layer[0].S"], torch.cat([cell, out], -1))


def _stored(model, row):
    for tensor in row.pattern().tensors():
        yield (
            (int(tensor.path.split("[")[1][0]),) if "[" in tensor.path else (),
            model.weight(tensor.path).detach(),
        )


def test_every_pass_keeps_what_is_computed(case):
    compiled = compile_model(str(case.path))
    programs = [compiled.after(stage) for stage in STAGES]
    for before, after in pairwise(programs):
        equivalent(before, after)


def test_gradients_are_those_of_the_loop(case):
    tokens = case.sequences[0]
    case.model.zero_grad()
    case.model(tokens[None]).logsumexp(-1).sum().backward()
    found = {n: p.grad.clone() for n, p in case.model.named_parameters()}
    with torch.enable_grad():
        weights = {n: p.detach().requires_grad_() for n, p in case.model.named_parameters()}
        x = weights["embed"][tokens]
        for layer in range(2):
            own = {n.split(".")[-1]: p for n, p in weights.items() if f".{layer}." in n}
            x = case.layer(own, x)
        (x @ weights["embed"].T).logsumexp(-1).sum().backward()
    for name, wanted in weights.items():
        if wanted.grad is not None:  # torch's own network has copies of its matrices
            assert_equal(found[name], wanted.grad, name, 1e-4)


def test_states_are_kept_per_sequence_and_counted_so(case):
    cache = case.model.new_cache(3)
    case.model(torch.zeros(3, 9, dtype=torch.int64), cache=cache)
    small = cache.nbytes
    case.model(torch.zeros(3, 90, dtype=torch.int64), cache=cache)
    assert cache.nbytes == small == 3 * case.model.state_bytes()
    assert case.model.cache_bytes_per_token() == 0
    assert [row.last for row in case.model.manifest.caches] == [1]
    assert json.loads(case.model.manifest.text())["caches"][0]["last"] == 1


def test_states_of_all_tokens_are_not_stored(case):
    """What reads them is done token by token, where one value is all that is read of them."""
    program = compile_model(str(case.path)).program
    [scan] = [n for g in program.bodies.values() for n in g if n.op == "scan"]
    state = program.bodies[scan.attrs["body"]].inputs[0].type

    def volume(type):
        shape = [d.size.at(program.sizes) for d in type.dims if d.kind != "time"]
        return torch.Size(shape).numel()

    reads = scan.attrs.get("read")
    assert (volume(scan.type) < volume(state)) == bool(reads)
    assert bool(reads) == (case.layer is not elman or volume(state) > 6)


def test_linear_recurrences_are_recognised_by_their_form(case):
    """Those that add one product of two vectors, and are read along the dim of one of them."""
    program = compile_model(str(case.path)).program
    [scan] = [n for g in program.bodies.values() for n in g if n.op == "scan"]
    expected = dict.fromkeys((gated, retention, delta), ("n", "v"))
    assert scan.attrs.get("linear") == expected.get(case.layer)


def test_a_block_with_a_state_runs_once_in_a_step(tmp_path):
    text = MODEL.format(block=ELMAN).replace("chain[l](layer, embed", "twice(layer, embed")
    text = text.replace("layer[l] = Mix[d]", "layer = Mix[d]")
    text = text.replace("twice(layer, embed[token[t], d])", "layer(layer(embed[token[t], d]))")
    (tmp_path / "twice.arch").write_text(text)
    with pytest.raises(dslc.DiagnosticError) as error:
        dslc.compile(str(tmp_path / "twice.arch"))
    first, *_, last = str(error.value).splitlines()
    assert first == (
        "error[E0506]: 'layer' runs twice in one step of 'main', and keeps 'H' each time"
    )
    assert last.strip() == (
        "hint: what is kept belongs to one use: use the block once for each time it runs"
    )
