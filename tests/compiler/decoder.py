"""A small decoder in the text form: cached attention, a loop over layers, routed experts, a second
entry that sees the next token. Rows of the text are what the elaborator would print, shortened."""

from compiler.ir import Program
from compiler.text import parse

TEXT = """\
program decoder of Model

const hidden = 64
const heads = 8
const width = 16
const layers = 10
const dense = 1
const experts = 16
const groups = 4
const open_groups = 2
const per_token = 4
const ffn = 48
const vocab = 100
const eps = 1e-06

ignored "model.copy"

module Model of Model {  // toy.arch:1
  dim w = vocab
  dim d = hidden
  dim a = dense
  dim z = layers - dense from dense
  param embed : act[w, d]  // toy.arch:2
  child layers[a] = Dense
  child layers[z] = Sparse
  name embed = "model.embed.weight"
  name layers[i] = "model.layers.{i}"
  method main = Model.main
}

module Dense of Dense {
  child attn = Attention
  method call = Dense.call
}

module Sparse of Sparse {
  dim e = experts
  dim d = hidden
  param centroid : act[e, d]
  state bias : f32[e]
  child attn = Attention
  child ffn[e] = Ffn
  method call = Sparse.call
}

module Attention of Attention {
  dim h = heads
  dim n = width
  dim j = width
  dim d = hidden
  param W_q : act[(h,n|j), d]
  param W_kv : act[n|j, d]
  param W_o : act[d, (h,n)]
  method call = Attention.call
}

module Ffn of Ffn {
  dim f = ffn
  dim d = hidden
  param W_up : act[f, d]
  param W_down : act[d, f]
  method call = Ffn.call
}

entry main = Model.main(token)
entry after = Model.after(token, next = token + 1)

body Model.main {
  dim t [time] = time
  dim w = vocab
  dim d = hidden
  dim a = dense
  dim z = layers - dense from dense
  dim r [rows] = wanted
  %token = input name="token" : i64[t] of w
  %embed = param param="embed" : act[w, d]
  %x0 = gather(%embed, %token) dim="w" : act[t, d] as x0 rounds  // toy.arch:11
  %x1 = chain(%x0) body="Dense.call" child="layers" index=`a` : act[t, d] as x1 rounds
  %x2 = chain(%x1) body="Sparse.call" child="layers" index=`z` : act[t, d] as x2 rounds
  %last = select_rows(%x2) : act[r, d]
  %logits = contract(%embed, %last) over=("d") : act[r, w] as logits rounds
  return %logits
}

body Model.after {
  dim t [time] = time
  dim w = vocab
  dim d = hidden
  dim a = dense
  dim x = hidden
  %token = input name="token" : i64[t] of w
  %next = input name="next" : i64[t] of w
  %embed = param param="embed" : act[w, d]
  %x0 = gather(%embed, %token) dim="w" : act[t, d] as x0 rounds
  %x1 = chain(%x0) body="Dense.call" child="layers" index=`a` : act[t, d] as x1 rounds
  %e = gather(%embed, %next) dim="w" : act[t, d] as e rounds
  %1 = rename(%e) dim="d" to=`x` : act[t, x]
  %2 = rename(%1) dim="x" to=`d` : act[t, d]
  %h = map(%x1, %2) fn="add" : act[t, d] as h rounds
  %logits = contract(%embed, %h) over=("d") : act[t, w] as logits rounds
  return %logits
}

body Dense.call {
  dim t [time] = time
  dim d = hidden
  %x = input name="x" : act[t, d]
  %h = call(%x) body="Attention.call" child="attn" dims=(("t", "t"), ("d", "d")) : act[t, d] as h
  %y = map(%x, %h) fn="add" : act[t, d] as y rounds
  return %y
}

body Attention.call {
  dim t [time] = time
  dim d = hidden
  dim h = heads
  dim n = width
  dim j = width
  dim s [history] = history
  dim p = width / 2
  dim o = 2
  %x = input name="x" : act[t, d]
  %W_q = param param="W_q" : act[(h,n|j), d]
  %1 = unflatten(%W_q) dim="(h,n|j)" into=(`h`, `n|j`) : act[h, n|j, d]
  %q = contract(%1, %x) over=("d") : act[t, h, n|j] as q rounds  // toy.arch:30
  %q_n = part(%q) dim="n|j" part="n" : act[t, h, n]
  %q_j = part(%q) dim="n|j" part="j" : act[t, h, j]
  %W_kv = param param="W_kv" : act[n|j, d]
  %kv = contract(%W_kv, %x) over=("d") : act[t, n|j]
  %c = cache(%kv) name="c" : act[s, n|j] as c rounds  // toy.arch:31
  %k = part(%c) dim="n|j" part="n" : act[s, n]
  %k_j = part(%c) dim="n|j" part="j" : act[s, j]
  %at = position : i64[t]
  %iota = iota : i64[p] of p
  %phase = map(%at, %iota) fn="mul" : i64[t, p]
  %half = constant value=0.5 : act[]
  %wave = map(%phase, %half) fn="mul" : f32[t, p]
  %cos = map(%wave) fn="cos" : f32[t, p]
  %pairs = unflatten(%q_j) dim="j" into=(`p`, `o`) : act[t, h, p, o]
  %left = select(%pairs) dim="o" at=0 : act[t, h, p]
  %right = select(%pairs) dim="o" at=1 : act[t, h, p]
  %l = map(%left, %cos) fn="mul" : f32[t, h, p]
  %r = map(%right, %cos) fn="mul" : f32[t, h, p]
  %both = stack(%l, %r) dim=`o` : f32[t, h, p, o]
  %turned = flatten(%both) dims=("p", "o") into=`j` : f32[t, h, j]
  %wide = cast(%q_n) : f32[t, h, n]
  %kw = cast(%k) : f32[s, n]
  %kjw = cast(%k_j) : f32[s, j]
  %s1 = contract(%wide, %kw) over=("n") : f32[h, t, s]
  %s2 = contract(%turned, %kjw) over=("j") : f32[h, t, s]
  %score = map(%s1, %s2) fn="add" : f32[h, t, s] as score
  %past = position : i64[s]
  %mask = map(%past, %at) fn="le" : bool[s, t]
  %inf = constant value=-inf : act[]
  %seen = map(%mask, %score, %inf) fn="where" : f32[h, t, s]
  %prob = softmax(%seen) over="s" : f32[h, t, s] as p
  %mixed = contract(%prob, %kw) over=("s") : f32[t, h, n]
  %out = cast(%mixed) : act[t, h, n] as o rounds  // toy.arch:36
  %W_o = param param="W_o" : act[d, (h,n)]
  %2 = unflatten(%W_o) dim="(h,n)" into=(`h`, `n`) : act[d, h, n]
  %y = contract(%2, %out) over=("h", "n") : act[t, d] as y rounds
  return %y
}

body Sparse.call {
  dim t [time] = time
  dim d = hidden
  dim e = experts
  dim g = groups
  dim m = experts / groups
  dim i = 2
  dim k = per_token
  %x = input name="x" : act[t, d]
  %h = call(%x) body="Attention.call" child="attn" dims=() : act[t, d] as h rounds
  %centroid = param param="centroid" : act[e, d]
  %1 = contract(%centroid, %h) over=("d") : act[t, e]
  %2 = map(%1) fn="sigmoid" : act[t, e]
  %affinity = cast(%2) : f32[t, e] as affinity rounds
  %bias = state param="bias" : f32[e]
  %biased = map(%affinity, %bias) fn="add" : f32[t, e] as biased rounds
  %grouped = unflatten(%biased) dim="e" into=(`g`, `m`) : f32[t, g, m]
  %best = top(%grouped) over="m" to="i" : f32[t, g, i]
  %worth = reduce(%best) fn="sum" over=("i") : f32[t, g] as worth rounds
  %open = in_top(%worth) over="g" count=<open_groups> : bool[t, g] as open
  %inf = constant value=-inf : act[]
  %left = map(%open, %grouped, %inf) fn="where" : f32[t, g, m]
  %flat = flatten(%left) dims=("g", "m") into=`e` : f32[t, e]
  %top = argtop(%flat) over="e" to="k" : i64[t, k] of e as pick
  %gate = gather(%affinity, %top) dim="e" : f32[t, k] as gate rounds
  %out = apply(%top, %h) body="Ffn.call" child="ffn" over="e" rows=("t", "k") dims=() : act[t, k, d]
  %wide = cast(%out) : f32[t, k, d]
  %mixed = contract(%gate, %wide) over=("k") : f32[t, d]
  %3 = cast(%mixed) : act[t, d]
  %y = map(%h, %3) fn="add" : act[t, d] as y rounds
  return %y
}

body Ffn.call {
  dim b [rows] = rows
  dim d = hidden
  dim f = ffn
  %x = input name="x" : act[b, d]
  %W_up = param param="W_up" : act[f, d]
  %up = contract(%W_up, %x) over=("d") : act[b, f] as up rounds
  %act = map(%up) fn="tanh" : act[b, f] as act rounds
  %W_down = param param="W_down" : act[d, f]
  %y = contract(%W_down, %act) over=("f") : act[b, d] as y rounds
  return %y
}
"""


def decoder(*changes: tuple[str, str]) -> Program:
    """The program, with parts of its text replaced."""
    text = TEXT
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return parse(text)
