"""The next token from the logits of what generates."""

from __future__ import annotations

from backends.triton.families import sampling
from backends.triton.kernel import Operator
from backends.triton.targets import Target
from compiler.ir import Program

GREEDY, DRAWN = "greedy", "drawn"
DTYPES = {"f32": "float32"}


def samplers(program: Program, target: Target, dtype: str) -> dict[str, Operator]:
    """Kernels that choose a token: greedily, and by chance.

    Where ``main`` takes tokens and gives, for each, a number for every token that could be next;
    none for models of anything else.

    Args:
        dtype: of activations, by torch's name.
    """
    entry = program.entries.get("main")
    given = [i for i in entry.inputs if i.shift_of is None] if entry else []
    if entry is None or len(given) != 1:
        return {}
    body = program.bodies[entry.body]
    tokens = next(n for n in body.inputs if n.attrs["name"] == given[0].name).type.of
    result = body.result.type
    if tokens is None or len(result.dims) != 2 or result.dtype not in ("act", "f32"):
        return {}
    vocab = program.size(tokens)
    if result.dims[-1].kind != "plain" or program.size(result.dims[-1]) != vocab:
        return {}
    held = DTYPES.get(result.dtype, dtype)
    return {
        name: sampling.generate(
            sampling.SamplingSpec(vocab, greedy=name == GREEDY, dtype=held), target
        )
        for name in (GREEDY, DRAWN)
    }
