"""The interpreter against formulas written a second time, by hand, in plain torch."""

from dataclasses import replace

import pytest
import torch
from decoder import decoder
from test_spec import one_body
from torch import Tensor

from compiler.interpret import CacheState, Interpreter, RunError, parameters, random_weights
from compiler.ir import Program
from compiler.shrink import shrink, shrunken

SMALL = shrunken(decoder(), shrink(decoder()))
WEIGHTS = random_weights(SMALL, seed=3, dtype=torch.float64)
TOKENS = torch.tensor([1, 4, 2, 0, 5, 5, 3])


def interpreter(program: Program = SMALL, act: torch.dtype = torch.float64) -> Interpreter:
    return Interpreter(program, WEIGHTS, act)


def run(nodes: str, dims: str = "", **inputs: Tensor) -> Tensor:
    """A body of one entry, in float64."""
    program = one_body(nodes, dims)
    return Interpreter(program, {}, torch.float64).run("main", inputs)


# -- the decoder, by hand --------------------------------------------------------------------------


def attention(path: str, x: Tensor) -> Tensor:
    """Causal attention of every position to those before, all heads at once."""
    w = {name: WEIGHTS[f"{path}.{name}"] for name in ("W_q", "W_kv", "W_o")}
    heads, width = SMALL.sizes["heads"], SMALL.sizes["width"]
    time = len(x)
    q = (x @ w["W_q"].T).view(time, heads, 2, width)
    kv = (x @ w["W_kv"].T).view(time, 2, width)
    positions, pairs = (torch.arange(n, dtype=torch.float64) for n in (time, width // 2))
    phase = positions[:, None] * pairs[None, :] * 0.5
    turned = q[:, :, 1] * torch.cos(phase).repeat_interleave(2, -1)[:, None]
    score = torch.einsum("thn,sn->hts", q[:, :, 0], kv[:, 0])
    score = score + torch.einsum("thj,sj->hts", turned, kv[:, 1])
    score = score.masked_fill(torch.ones(time, time).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("hts,sn->thn", score.softmax(-1), kv[:, 0])
    return mixed.reshape(time, -1) @ w["W_o"].T


def experts(path: str, x: Tensor) -> Tensor:
    """Token by token: the best groups, then the best experts in them."""
    groups, per_token = SMALL.sizes["groups"], SMALL.sizes["per_token"]
    out = []
    for token in x:
        affinity = torch.sigmoid(WEIGHTS[f"{path}.centroid"] @ token)
        biased = (affinity + WEIGHTS[f"{path}.bias"]).view(groups, -1)
        worth = biased.topk(2, -1).values.sum(-1)
        closed = torch.ones(groups, dtype=torch.bool)
        closed[worth.topk(SMALL.sizes["open_groups"]).indices] = False
        picks = biased.masked_fill(closed[:, None], -torch.inf).flatten().topk(per_token).indices
        mixed = torch.zeros_like(token)
        for pick in picks.tolist():
            up, down = (WEIGHTS[f"{path}.ffn[{pick}].{n}"] for n in ("W_up", "W_down"))
            mixed += affinity[pick] * (down @ torch.tanh(up @ token))
        out.append(token + mixed)
    return torch.stack(out)


def by_hand(tokens: Tensor) -> Tensor:
    x = WEIGHTS["embed"][tokens]
    for layer in range(SMALL.sizes["dense"]):
        x = x + attention(f"layers[{layer}].attn", x)
    for layer in range(SMALL.sizes["dense"], SMALL.sizes["layers"]):
        x = experts(f"layers[{layer}]", attention(f"layers[{layer}].attn", x))
    return x @ WEIGHTS["embed"].T


def close(found: Tensor, wanted: Tensor, to: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=to, atol=to)


def test_a_whole_prompt() -> None:
    close(interpreter().run("main", {"token": TOKENS}), by_hand(TOKENS))


@pytest.mark.parametrize("chunks", [(7,), (1,) * 7, (3, 2, 1, 1)])
def test_in_chunks_and_single_tokens(chunks: tuple[int, ...]) -> None:
    state, pieces = CacheState(), TOKENS.split(chunks)
    parts = [interpreter().run("main", {"token": piece}, state=state) for piece in pieces]
    close(torch.cat(parts), by_hand(TOKENS))
    assert state.length == len(TOKENS)


def test_what_was_rejected_is_forgotten() -> None:
    state = CacheState()
    interpreter().run("main", {"token": TOKENS[:4]}, state=state)
    other = state.copy()
    interpreter().run("main", {"token": torch.tensor([6, 6])}, state=state)
    state.truncate(4)
    last = [interpreter().run("main", {"token": TOKENS[4:]}, state=s) for s in (state, other)]
    close(last[0], by_hand(TOKENS)[4:])
    close(last[1], last[0])


def test_only_wanted_rows() -> None:
    found = interpreter().run("main", {"token": TOKENS}, rows=[6, 0])
    close(found, by_hand(TOKENS)[[6, 0]])


def test_a_shifted_input_is_made_and_rows_without_one_are_dropped() -> None:
    made = interpreter().run("after", {"token": TOKENS})
    given = interpreter().run("after", {"token": TOKENS[:-1], "next": TOKENS[1:]})
    assert len(made) == len(TOKENS) - 1
    close(made, given)


def test_single_precision_is_close() -> None:
    found = interpreter(act=torch.float32).run("main", {"token": TOKENS})
    assert found.dtype == torch.float32
    close(found.double(), by_hand(TOKENS), to=1e-4)


def test_sizes_may_be_given_apart() -> None:
    found = Interpreter(decoder(), WEIGHTS, torch.float64, shrink(decoder()))
    close(found.run("main", {"token": TOKENS}), by_hand(TOKENS))


# -- traces, rounding, errors ----------------------------------------------------------------------


def test_every_named_value_can_be_seen_under_its_path() -> None:
    trace: dict[str, Tensor] = {}
    interpreter().run("main", {"token": TOKENS}, trace=trace)
    layers = SMALL.sizes["layers"]
    assert f"layers[{layers - 1}].attn.c" in trace
    assert f"layers[{layers}].attn.c" not in trace
    close(trace["x0"], WEIGHTS["embed"][TOKENS])
    picks = trace["layers[1].pick"]
    assert picks.shape == (len(TOKENS), SMALL.sizes["per_token"])
    first = int(picks.unique()[0])
    rows = int((picks == first).sum())
    assert trace[f"layers[1].ffn[{first}].up"].shape == (rows, SMALL.sizes["ffn"])


def test_a_plain_name_rounds_and_a_let_does_not() -> None:
    body = """\
  %x = input name="x" : act[t]
  %third = constant value=0.3333 : act[]
  %y = map(%x, %third) fn="mul" : act[t] as y ROUNDS
  %thousand = constant value=1000.0 : act[]
  %z = map(%y, %thousand) fn="mul" : act[t] as z
  return %z"""
    results = {}
    for rounds in ("rounds", ""):
        program = one_body(body.replace("ROUNDS", rounds))
        trace: dict[str, Tensor] = {}
        Interpreter(program, {}, torch.bfloat16).run("main", {"x": torch.ones(1)}, trace=trace)
        results[rounds] = float(trace["z"])
    assert results[""] == pytest.approx(333.3)
    assert results["rounds"] == 1000 * float(torch.tensor(0.3333).bfloat16())


def test_bf16_contractions_accumulate_in_f32() -> None:
    program = one_body(
        """\
  %x = input name="x" : act[t, a]
  %y = contract(%x) over=("a") : act[t] as y
  return %y"""
    )
    trace: dict[str, Tensor] = {}
    x = torch.tensor([[256.0, 1, 1, 1, 1, 1]])
    Interpreter(program, {}, torch.bfloat16).run("main", {"x": x}, trace=trace)
    assert float(trace["y"]) == 261  # in bf16, 256 + 1 is 256


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('param="W_q"', 'param="W_x"', "there is no weight 'layers[0].attn.W_x'"),
        ("part=\"n\" : act[s, n]", "part=\"x\" : act[s, n]", "'x'"),
        ("at=1", "at=7", "index 7 is out of bounds"),
        ("%mixed = contract(%prob, %kw) over=(\"s\")", "%mixed = contract(%prob, %kw) over=()",
         "dims ['s'] are lost"),
    ],
)  # fmt: skip
def test_an_error_names_the_source_line(old: str, new: str, message: str) -> None:
    program = shrunken(decoder((old, new)), shrink(decoder()))
    with pytest.raises(RunError) as error:
        Interpreter(program, WEIGHTS).run("main", {"token": TOKENS})
    assert message in str(error.value)
    assert "in Attention.call at layers[0].attn" in str(error.value)


def test_a_wrong_result_names_the_source_line() -> None:
    old = '%x0 = gather(%embed, %token) dim="w" : act[t, d]'
    program = shrunken(decoder((old, old.replace("t, d", "t, a"))), shrink(decoder()))
    with pytest.raises(RunError, match=r"toy.arch:11: %x0 = gather in Model.main: "):
        Interpreter(program, WEIGHTS).run("main", {"token": TOKENS})


def test_weights_of_another_shape_are_refused() -> None:
    wrong = {**WEIGHTS, "embed": torch.zeros(3, 3)}
    with pytest.raises(RunError, match=r"weight 'embed' is \[3, 3\], not act\[w, d\] = "):
        Interpreter(SMALL, wrong).run("main", {"token": TOKENS})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(RunError, match="there is no entry 'mian'"):
        interpreter().run("mian", {"token": TOKENS})
    with pytest.raises(RunError, match="entry 'main' needs the input 'token'"):
        interpreter().run("main", {})
    with pytest.raises(RunError, match="'next' is 'token' 1 later: there is none"):
        interpreter().run("after", {"token": TOKENS[:1]})


# -- single ops ------------------------------------------------------------------------------------


def test_a_row_that_sees_nothing_is_zero() -> None:
    found = run(
        """\
  %x = input name="x" : act[t, a]
  %y = softmax(%x) over="a" : act[t, a]
  return %y""",
        x=torch.tensor([[-torch.inf] * 6, [0.0] * 6]),
    )
    close(found, torch.tensor([[0.0] * 6, [1 / 6] * 6], dtype=torch.float64))


CHOICE = """\
  %x = input name="x" : act[t, a]
  %values = top(%x) over="a" to="k" : act[t, k]
  %picks = argtop(%x) over="a" to="k" : i64[t, k] of a
  %in = in_top(%x) over="a" count=<3> : bool[t, a]
  return %RESULT"""


@pytest.mark.parametrize(
    ("result", "wanted"),
    [
        ("values", [[2.0, 2.0, 1.0]]),
        ("picks", [[1, 3, 0]]),
        ("in", [[True, True, False, True, False, False]]),
    ],
)
def test_ties_go_to_the_lowest_index(result: str, wanted: list[list[float]]) -> None:
    x = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]])
    found = run(CHOICE.replace("RESULT", result), "  dim k = 3", x=x)
    assert found.tolist() == wanted


def test_what_is_minus_infinity_is_in_no_top() -> None:
    x = torch.tensor([[-torch.inf, 2.0, -torch.inf, -torch.inf, 1.0, -torch.inf]])
    found = run(CHOICE.replace("RESULT", "in"), "  dim k = 3", x=x)
    assert found.tolist() == [[False, True, False, False, True, False]]


def test_gather_aligns_what_both_have() -> None:
    found = run(
        """\
  %x = input name="x" : act[t, a]
  %picks = argtop(%x) over="a" to="b" : i64[t, b] of a
  %y = gather(%x, %picks) dim="a" : act[t, b]
  return %y""",
        x=(x := torch.randn(3, 6, dtype=torch.float64)),
    )
    close(found, x.sort(-1, descending=True).values[:, :4])


def test_views_are_row_major() -> None:
    x = torch.arange(24.0, dtype=torch.float64).view(1, 6, 4)
    joined = run(
        """\
  %x = input name="x" : act[t, a, b]
  %y = flatten(%x) dims=("b", "a") into=`(b,a)` : act[(b,a), t]
  return %y""",
        x=x,
    )
    close(joined, x.permute(2, 1, 0).reshape(24, 1))
    halves = run(
        """\
  %x = input name="x" : act[t, a, b]
  %1 = unflatten(%x) dim="a" into=(`h`, `o`) : act[t, h, o, b]
  %2 = select(%1) dim="o" at=1 : act[b, t, h]
  %y = expand(%2) dims=(`o`) : act[o, b, t, h]
  return %y""",
        "  dim h = a / 2\n  dim o = 2",
        x=x,
    )
    close(halves, x.view(1, 3, 2, 4)[:, :, 1].permute(2, 0, 1).expand(2, 4, 1, 3))
    both = run(
        """\
  %x = input name="x" : act[t, a, b]
  %1 = select(%x) dim="a" at=0 : act[t, b]
  %2 = select(%x) dim="b" at=3 : act[t, a]
  %y = concat(%1, %2) dim=`b|a` : act[b|a, t]
  return %y""",
        x=x,
    )
    close(both, torch.cat([x[:, 0], x[:, :, 3]], -1).T)


def test_a_branch_can_be_forced() -> None:
    program = one_body(
        """\
  %x = input name="x" : act[t]
  %y = branch(%x) when=("time", "<=", 2) then="few" otherwise="many" : act[t]
  return %y
}
body few {
  dim t [time] = time
  %x = input name="x" : act[t]
  %y = map(%x) fn="neg" : act[t]
  return %y
}
body many {
  dim t [time] = time
  %x = input name="x" : act[t]
  return %x"""
    )
    both = Interpreter(program, {}, torch.float64)
    for time, sign in ((2, -1.0), (3, 1.0)):
        x = torch.ones(time, dtype=torch.float64)
        assert both.run("main", {"x": x}).tolist() == [sign] * time
        assert both.run("main", {"x": x}, branches="then").tolist() == [-1.0] * time
        assert both.run("main", {"x": x}, branches="otherwise").tolist() == [1.0] * time


def test_a_composite_is_its_body() -> None:
    program = one_body(
        """\
  %x = input name="x" : act[t, a]
  %y = rms_norm(%x) body="norm" over=("a") eps=0.0 gain=null rounds_before_gain=false : act[t, a]
  return %y
}
body norm {
  dim t [time] = time
  dim a = a
  %x = input name="x" : act[t, a]
  %1 = map(%x, %x) fn="mul" : act[t, a]
  %2 = reduce(%1) fn="mean" over=("a") : act[t]
  %3 = map(%2) fn="rsqrt" : act[t]
  %y = map(%x, %3) fn="mul" : act[t, a]
  return %y"""
    )
    x = torch.randn(2, 6, dtype=torch.float64)
    found = Interpreter(program, {}, torch.float64).run("main", {"x": x})
    close(found, torch.nn.functional.rms_norm(x, (6,), eps=0.0))


# -- weights ---------------------------------------------------------------------------------------


def test_weights_are_a_function_of_seed_and_path() -> None:
    again = random_weights(SMALL, seed=3, dtype=torch.float64)
    assert all(torch.equal(again[path], value) for path, value in WEIGHTS.items())
    more = replace(SMALL, constants={**SMALL.constants, "layers": SMALL.sizes["layers"] + 1})
    longer = random_weights(more, seed=3, dtype=torch.float64)
    assert longer.keys() > WEIGHTS.keys()
    assert all(torch.equal(longer[path], value) for path, value in WEIGHTS.items())
    assert not torch.equal(random_weights(SMALL, seed=4)["embed"], WEIGHTS["embed"].float())


def test_every_parameter_has_a_path() -> None:
    paths = [path for path, _ in parameters(SMALL)]
    assert len(paths) == len(set(paths))
    assert {"embed", "layers[0].attn.W_q", "layers[1].bias", "layers[1].ffn[2].W_up"} <= set(paths)
