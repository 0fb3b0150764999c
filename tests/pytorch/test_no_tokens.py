"""A rank without sequences takes part with no tokens: what runs along a history does so too."""

import pytest
import torch

from backends.pytorch.runtime import Cache, Step
from compiler.pipeline import compile_model
from dsl.constants import Choices
from tests.pytorch.running import Both

SOURCE = """
edition 2026
index t : time, s : history t
model Along {
  index d : 6, w : 31, e : 5
  param embed[w, d]
  param A[e, d]
  param B[d, e]
  def main(token[t] of w) -> logits[t,w] {
    x[t,d] = embed[token[t], d]
    cached k[s,e] = A[e,d] * x[t,d]
    q[t,e] = A[e,d] * x[t,d]
    let seen[t,s] = position[s] <= position[t]
    let score[t,s,e]: f32 = where(seen[t,s], q[t,e] * k[s,e], -inf)
    let near[t,s,e] = where(seen[t,s], broadcast[s](q[t,e]) + broadcast[t](k[s,e]), inf)
    high[t,e] = max[s](score[t,s,e])
    low[t,e]  = min[s](near[t,s,e])
    mid[t,e]  = mean[s](where(seen[t,s], q[t,e] * k[s,e], 0))
    let best[t,s] = in_top[s, 3](where(seen[t,s], q[t,e] * k[s,e], -inf))
    some[t,e] = sum[s](where(best[t,s], broadcast[s](q[t,e]) + broadcast[t](k[s,e]), 0))
    let p[t,s,e]: f32 = softmax[s](score[t,s,e])
    o[t,e] = p[t,s,e] * k[s,e]
    logits[t,w] = embed[w,d] * (B[d,e] * (high[t,e] + low[t,e] + mid[t,e] + some[t,e] + o[t,e]))
  }
}
"""


@pytest.fixture(scope="module")
def along(tmp_path_factory):
    file = tmp_path_factory.mktemp("along") / "along.arch"
    file.write_text(SOURCE)
    return Both(compile_model(str(file), Choices()).after("lifetimes"))


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
@pytest.mark.parametrize("cached", [False, True])
def test_no_tokens(along, counts, cached):
    cache = Cache(len(counts)) if cached else None
    step = Step(counts, cache=cache)
    assert along.model.main(step, torch.empty(0, dtype=torch.int64)).shape == (0, 31)


def test_some_have_none(along):
    tokens = torch.tensor([3, 1, 4, 1, 5])
    both = along.model.main(Step([2, 0, 3]), tokens)
    alone = [along.model.main(Step([n]), t) for n, t in ((2, tokens[:2]), (3, tokens[2:]))]
    assert torch.allclose(both, torch.cat(alone), atol=1e-5)
