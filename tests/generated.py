"""Whole generated models: layers of generated blocks, embedded and read out."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from tests.programs import Block
from tests.programs_base import HEAD

OPERATIONS = (
    "project project multiply multiply add pointwise gate normed soft reduce cached along attend "
    "attend masked pick among experts called rotated viewed viewed joined places inner "
    "shifted remembered remembered"
).split()


@st.composite
def models(draw: Callable[..., object], most: int = 9) -> str:
    """A model of one to three kinds of layer."""
    hidden = draw(st.sampled_from([1, 2, 3, 4, 6]))
    kinds = draw(st.integers(1, 2))
    text = HEAD.format(hidden=hidden)
    for kind in range(kinds):  # type: ignore[call-overload]
        block = Block(draw, hidden)  # type: ignore[arg-type]
        for operation in draw(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=most)):  # type: ignore[attr-defined]
            getattr(block, operation)()
        result = block.finish()
        indices = f"  index {', '.join(block.indices)}\n" if block.indices else ""
        members = "".join(f"  {line}\n" for line in block.members)
        lines = "".join(f"    {line}\n" for line in [*block.lines, result])
        text += f"block Mixer{kind}[d] {{\n{indices}{members}"
        text += f"  def (x[t,d]) -> y[t,d] {{\n{lines}  }}\n}}\n"
    return text + _model(draw, kinds)  # type: ignore[arg-type]


def _model(draw: Callable[..., object], kinds: int) -> str:
    pieces, start, calls = [], 0, []
    indices = []
    for number in range(draw(st.integers(1, 3))):  # type: ignore[call-overload]
        length = draw(st.integers(0, 2))
        block = f"Mixer{draw(st.integers(0, kinds - 1))}"
        indices.append(f"l{number} : {start} .. {start + length}")  # type: ignore[operator]
        pieces.append(f"layers[l{number}] = {block}[d]")
        calls.append(f"x{number + 1}[t,d] = chain[l{number}](layers, x{number}[t,d])")
        start += length  # type: ignore[operator, assignment]
    last = f"x{len(calls)}[t,d]"
    more = ""
    if draw(st.booleans()):
        indices.append("z : 0 .. 2")
        pieces.append("more[z] = Step[d]")
        calls.append(f"u[t,d] = chain[z](more, {last}, x0[t,d])")
        last = "u[t,d]"
    if draw(st.booleans()):
        more = """
  def ahead(token[t] of w, after[t] = token[t + 1]) -> logits[t,w] {
    g[t,d] = trunk(token[t]) - embed[after[t],d]
    logits[t,w] = head[w,d] * g[t,d]
  }"""
    body = "\n    ".join(calls)
    return f"""
model Own {{
  index d : hidden, w : vocab, {", ".join(indices)}
  param embed[w,d]  param head[w,d]
  use {", ".join(pieces)}
  use norm = RMSNorm[d]
  def trunk(token[t] of w) -> h[t,d] {{
    x0[t,d] = embed[token[t], d]
    {body}
    h[t,d] = norm({last})
  }}
  def main(token[t] of w) -> logits[t,w] {{
    logits[t,w] = head[w,d] * trunk(token[t])
  }}{more}
}}
"""
