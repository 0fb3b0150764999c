"""Dispatch and combine on one rank: what is sent is what arrives, in order of the blocks."""

import torch
from torch import nn

from backends.pytorch.runtime import Coding, Mesh, number_format, quantize

F32 = number_format(
    "f32",
    exponent=8,
    fraction=23,
    bias=127,
    infinities=True,
    nans=True,
    largest=3.4028234663852886e38,
)
E4M3 = number_format(
    "e4m3",
    exponent=4,
    fraction=3,
    bias=7,
    nans=True,
    largest=448.0,
    scale=F32,
    rounding="nearest",
)


class Scale(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x * self.by


def routed(pick, gate):
    mesh = Mesh({"ep": 1})
    mesh.connect(0)
    blocks = nn.ModuleList(Scale(n + 1.0) for n in range(4))
    blocks.path = "expert"
    return blocks, mesh.route(blocks, pick, gate, "ep")


def test_each_row_goes_through_the_blocks_that_it_picked():
    x = torch.randn(3, 5)
    pick, gate = torch.tensor([[0, 2], [3, 0], [2, 1]]), torch.rand(3, 2)
    blocks, sent = routed(pick, gate)
    assert sent.block.tolist() == [0, 0, 1, 2, 2, 3]
    found = sent.combine(sent.apply(blocks, sent.dispatch(x[:, None])))
    wanted = x * (gate * (pick + 1)).sum(1, keepdim=True)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_no_tokens_at_all():
    blocks, sent = routed(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    found = sent.combine(sent.apply(blocks, sent.dispatch(torch.zeros(0, 1, 5))))
    assert found.shape == (0, 5)


def test_codes_and_scales_arrive_as_they_are():
    x = torch.randn(3, 10) * torch.tensor([[1.0], [100.0], [0.01]])
    codes = quantize(x, Coding(E4M3, 1, 4))
    _, sent = routed(torch.tensor([[0, 2], [3, 0], [2, 1]]), torch.rand(3, 2))
    got = sent.dispatch(codes[:, None])
    rows = torch.tensor([0, 1, 2, 0, 2, 1])  # by block, then by token
    assert torch.equal(got.codes.view(torch.uint8), codes.codes.view(torch.uint8)[rows])
    assert torch.equal(got.scales, codes.scales[rows])
