"""A small model with heads, experts and layers, and deployments of it that are wrong.

``python tests/dsl/deploy_toy.py --update`` writes the messages of ``deployments/*.txt`` anew.
"""

import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

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


FOLDER = Path(__file__).with_name("deployments")


def write(text: str) -> str:
    """``case.arch``, which imports the model, in the current folder."""
    Path("toy.arch").write_text(TOY)
    Path("case.arch").write_text("import toy\n" + text)
    return "case.arch"


def program(text: str, **constants: int) -> CheckedProgram:
    return open_program(write(text), Choices(set=constants))


def cases() -> Iterator[tuple[str, str, str]]:
    """Title, text and message of each case in ``deployments/*.txt``."""
    for path in sorted(FOLDER.glob("*.txt")):
        for case in path.read_text().split("\n==== ")[1:]:
            title, _, rest = case.partition("\n\n")
            text, _, message = rest.partition("\n\n---- says\n")
            yield title, text, message.rstrip("\n")


def said(text: str) -> str:
    """What ``dslc check`` says about a case, in the current folder."""
    return "\n".join(d.render() for d in check_file(write(text)))


def update() -> None:
    """Write down what is said now; read what changes as you would read a page of the manual."""
    for path in sorted(FOLDER.glob("*.txt")):
        head, *sections = path.read_text().split("\n==== ")
        kept = [section.partition("\n\n---- says\n")[0] for section in sections]
        texts = [section.partition("\n\n")[2] for section in kept]
        with TemporaryDirectory() as folder, chdir(folder):
            messages = [said(text) for text in texts]
        pairs = zip(kept, messages, strict=True)
        out = [f"==== {section}\n\n---- says\n{message}\n" for section, message in pairs]
        path.write_text("\n".join([head, *out]))


if __name__ == "__main__" and sys.argv[1:] == ["--update"]:
    update()
