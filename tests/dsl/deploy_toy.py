"""A small model with heads, experts and layers, for tests of deployments."""

from pathlib import Path

from dsl.constants import Choices
from dsl.program import CheckedProgram, check_file, open_program

TOY = """\
import std.formats
index t : time
const width = 8  const heads = 4  const words = 10  const depth = 5  const mixed = 6

block Attention[d] {
  index h : heads, v : 2
  param W[(h, v), d]
  param O[d, (h, v)]
  def (x[t,d]) -> y[t,d] {
    a[t,h,v] = W[(h,v),d] * x[t,d]
    y[t,d]   = O[d,(h,v)] * a[t,h,v]
  }
}

block Expert[d, f] {
  param up[f, d]
  param down[d, f]
  def (x[d]) -> y[d] {
    z[f] = up[f,d] * x[d]
    y[d] = down[d,f] * z[f]
  }
}

block Mixture[d] {
  index e : mixed, k : 2, f : 12
  param router[e, d]
  use expert[e] = Expert[d, f]
  def (x[d]) -> y[d] {
    score[e] = router[e,d] * x[d]
    pick[k]  = argtop[e -> k](score[e])
    y[d]     = score[pick[k]] * expert[pick[k]](x[d])
  }
}

block Layer[d] {
  use attn = Attention[d]
  use mlp  = Mixture[d]
  def (x[t,d]) -> y[t,d] {
    h[t,d] = x[t,d] + attn(x[t,d])
    y[t,d] = h[t,d] + mlp(h[t,d])
  }
}

model Toy {
  index d : width, w : words, z : 0 .. depth
  param embed[w, d]
  use layers[z] = Layer[d]
  def main(token[t] of w) -> logits[t,w] {
    x[t,d] = embed[token[t], d]
    logits[t,w] = embed[w,d] * chain[z](layers, x[t,d])
  }
}
"""


def write(text: str) -> str:
    """``case.arch``, which imports the model, in the current folder."""
    Path("toy.arch").write_text(TOY)
    Path("case.arch").write_text("import toy" + text)
    return "case.arch"


def messages(text: str) -> str:
    """What ``dslc check`` says, between line breaks."""
    found = check_file(write(text))
    return "\n" + "\n".join(d.render() for d in found) + "\n"


def program(text: str, **constants: int) -> CheckedProgram:
    return open_program(write(text), Choices(set=constants))
