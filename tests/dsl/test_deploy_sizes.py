"""Deployments that cannot hold at the sizes of their model, each with the whole message."""

import pytest
from deploy_toy import messages

CASES = {
    "twice_in_value": (
        """
deploy a of Toy {
  mesh  tp = 2
  shard Attention.h -> tp, width -> tp
}
""",
        """
error[E0814]: mesh axis 'tp' would divide 'W' of 'Attention' twice, along 'h' and along 'd'
  --> case.arch:4:28
  |
4 |   shard Attention.h -> tp, width -> tp
  |                            ^^^^^^^^^^^
  ::: case.arch:4:9
  |
4 |   shard Attention.h -> tp, width -> tp
  |         ----------------- 'tp' is given to 'h' here
  ::: toy.arch:7:9
  |
7 |   param W[(h, v), d]
  |         - 'W' has both
  hint: give one of them another axis
""",
    ),
    "batch_and_index": (
        """
deploy a of Toy {
  mesh  ep = 2
  shard batch -> ep, Mixture.e -> ep
}
""",
        """
error[E0814]: mesh axis 'ep' would divide 'score' of 'Mixture' twice, along 'batch' and along 'e'
  --> case.arch:4:22
  |
4 |   shard batch -> ep, Mixture.e -> ep
  |                      ^^^^^^^^^^^^^^^
  ::: case.arch:4:9
  |
4 |   shard batch -> ep, Mixture.e -> ep
  |         ----------- 'ep' is given to 'batch' here
   ::: toy.arch:29:5
   |
29 |     score[e] = router[e,d] * x[d]
   |     ----------------------------- 'score' has both
  hint: give one of them another axis, or place an array of blocks instead of its index
""",
    ),
    "two_rules": (
        """
deploy a of Toy {
  mesh  tp = 2, ep = 2
  shard Mixture.f -> tp, Expert.f -> ep
}
""",
        """
error[E0814]: 'f' is one index, and two rules divide it differently
  --> case.arch:4:26
  |
4 |   shard Mixture.f -> tp, Expert.f -> ep
  |                          ^^^^^^^^^^^^^^
  ::: case.arch:4:9
  |
4 |   shard Mixture.f -> tp, Expert.f -> ep
  |         --------------- the other rule is here
   ::: toy.arch:15:17
   |
15 | block Expert[d, f] {
   |                 - it is passed on here
  hint: keep one of the rules
""",
    ),
    "divide": (
        """
deploy a of Toy {
  mesh  ep = 4
  shard Mixture.expert -> ep
}
""",
        """
error[E0815]: 'Mixture.expert' has 6 entries, which 4 ranks cannot share evenly
  --> case.arch:4:9
  |
4 |   shard Mixture.expert -> ep
  |         ^^^^^^^^^^^^^^^^^^^^
   ::: toy.arch:27:7
   |
27 |   use expert[e] = Expert[d, f]
   |       ------------------------ declared here
  hint: copies fill up the ranks: Mixture.expert -> ep with 2 redundant
""",
    ),
    "divide_index": (
        """
deploy a of Toy {
  mesh  tp = 3
  shard heads -> tp
}
""",
        """
error[E0815]: 'Attention.h' has 4 entries, which 3 ranks cannot share evenly
  --> case.arch:4:9
  |
4 |   shard heads -> tp
  |         ^^^^^^^^^^^
  ::: toy.arch:6:9
  |
6 |   index h : heads, v : 2
  |         - declared here
""",
    ),
    "large": (
        """
device D { peak[scale_up] = 1 GB/s "guess, 2025" }
cluster c { cpu = D, per_node = 4, nodes = 1 }
deploy a of Toy on c {
  mesh  dp = 2, ep = 3
  shard batch -> (dp, ep), Mixture.expert -> ep
}
""",
        """
error[E0816]: the mesh has 6 ranks, and cluster 'c' has 4 devices
  --> case.arch:5:3
  |
5 |   mesh  dp = 2, ep = 3
  |   ^^^^^^^^^^^^^^^^^^^^ 2 x 3
  ::: case.arch:3:9
  |
3 | cluster c { cpu = D, per_node = 4, nodes = 1 }
  |         - nodes: 1, devices in each: 4
""",
    ),
    "unused": (
        """
deploy a of Toy {
  mesh  ep = 2, dp = 2
  shard Mixture.expert -> ep
}
""",
        """
error[E0819]: nothing is spread over mesh axis 'dp': its 2 ranks would all do the same
  --> case.arch:3:17
  |
3 |   mesh  ep = 2, dp = 2
  |                 ^^
  hint: shard batch -> dp gives each its own sequences
""",
    ),
    "stages": (
        """
deploy a of Toy {
  mesh   pp = 2
  stages pp : layers as (2, 2)
  train  batch = 4, sequence = 8
}
""",
        """
error[E0817]: these stages hold 4 layers, and 0 .. 5 are 5
  --> case.arch:4:15
  |
4 |   stages pp : layers as (2, 2)
  |               ^^^^^^^^^^^^^^^^
  hint: 4 x 15 is 15 stages of 4 layers each
""",
    ),
    "stages_ranks": (
        """
deploy a of Toy {
  mesh   pp = 2
  stages pp : layers as (2, 2, 1)
  train  batch = 4, sequence = 8
}
""",
        """
error[E0817]: these are 3 stages, and 'pp' has 2 ranks
  --> case.arch:4:3
  |
4 |   stages pp : layers as (2, 2, 1)
  |   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: as many stages as ranks, or a whole multiple of them
""",
    ),
    "stages_gap": (
        """
deploy a of Toy {
  mesh   pp = 2
  stages pp : layers 0 .. 2 as (2), layers 3 .. 5 as (2)
  train  batch = 4, sequence = 8
}
""",
        """
error[E0817]: layers 2 .. 3 of 'layers' stand in no stage
  --> case.arch:4:37
  |
4 |   stages pp : layers 0 .. 2 as (2), layers 3 .. 5 as (2)
  |                                     ^^^^^^^^^^^^^^^^^^^^
""",
    ),
    "stages_twice": (
        """
deploy a of Toy {
  mesh   pp = 2
  stages pp : layers 0 .. 3 as (3), layers 2 .. 5 as (3)
  train  batch = 4, sequence = 8
}
""",
        """
error[E0817]: layer 2 of 'layers' stands in two stages
  --> case.arch:4:37
  |
4 |   stages pp : layers 0 .. 3 as (3), layers 2 .. 5 as (3)
  |                                     ^^^^^^^^^^^^^^^^^^^^
  ::: case.arch:4:15
  |
4 |   stages pp : layers 0 .. 3 as (3), layers 2 .. 5 as (3)
  |               -------------------- the first one is here
""",
    ),
    "stages_even": (
        """
deploy a of Toy {
  mesh   pp = 2
  stages pp : layers
  train  batch = 4, sequence = 8
}
""",
        """
error[E0817]: 5 layers do not divide by 2 ranks
  --> case.arch:4:15
  |
4 |   stages pp : layers
  |               ^^^^^^
  hint: say how: as (3 x 1, 2 x 1)
""",
    ),
    "stages_name": (
        """
deploy a of Toy {
  mesh   pp = 5
  stages pp : layer, mtp with the last
  train  batch = 4, sequence = 8
}
""",
        """
error[E0811]: 'Toy' chains no array of blocks called 'layer'
  --> case.arch:4:15
  |
4 |   stages pp : layer, mtp with the last
  |               ^^^^^
  hint: did you mean 'layers'?
error[E0811]: 'Toy' has no entry point or use called 'mtp'
  --> case.arch:4:22
  |
4 |   stages pp : layer, mtp with the last
  |                      ^^^
  hint: it has main
""",
    ),
    "schedule": (
        """
deploy a of Toy {
  overlap dualpip
}
""",
        """
error[E0818]: no schedule is called 'dualpip'
  --> case.arch:3:11
  |
3 |   overlap dualpip
  |           ^^^^^^^
  hint: did you mean 'dualpipe'?
""",
    ),
    "schedule_serves": (
        """
deploy a of Toy {
  overlap dualpipe
  serve decode batch_per_rank = 2, context = 8
}
""",
        """
error[E0818]: 'dualpipe' is a schedule of a training pipeline, and this deployment has no 'stages'
  --> case.arch:3:3
  |
3 |   overlap dualpipe
  |   ^^^^^^^^^^^^^^^^
  hint: inference hides communication with: overlap two_microbatches
""",
    ),
    "dualpipe": (
        """
deploy a of Toy {
  mesh    pp = 2
  stages  pp : layers as (3, 2)
  overlap dualpipe
  train   batch = 3, sequence = 8
}
""",
        """
error[E0818]: 'dualpipe' takes an even number of micro-batches, at least 4 for 2 ranks, not 3
  --> case.arch:5:3
  |
5 |   overlap dualpipe
  |   ^^^^^^^^^^^^^^^^
  ::: case.arch:6:3
  |
6 |   train   batch = 3, sequence = 8
  |   ------------------------------- batch and micro_batch are given here
""",
    ),
    "rounds": (
        """
deploy a of Toy {
  mesh dp = 2
  shard batch -> dp
  train batch = 5, sequence = 8
}
""",
        """
error[E0815]: a batch of 5 does not divide into rounds of 2 sequences: 2 ranks with 1 each
  --> case.arch:5:3
  |
5 |   train batch = 5, sequence = 8
  |   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
""",
    ),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_the_whole_message(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert messages(text) == expected
