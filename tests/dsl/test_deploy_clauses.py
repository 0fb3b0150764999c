"""Mistakes in precision, recompute, train and serve, each with its whole message."""

import pytest
from deploy_toy import messages

CASES = {
    "tile": (
        """
deploy a of Toy {
  precision fp8(e4m3, weights = 128 x 128) for contractions
}
""",
        """
error[E0820]: 'e4m3' has a scale per tile, and nothing says how large a tile is
  --> case.arch:3:17
  |
3 |   precision fp8(e4m3, weights = 128 x 128) for contractions
  |                 ^^^^
  hint: activations = 1 x 128, weights = 128 x 128; all x all is one scale per tensor
""",
    ),
    "notile": (
        """
deploy a of Toy {
  precision half(bf16, weights = 1 x 128)
}
""",
        """
error[E0820]: 'bf16' has no scales, so it has no tiles
  --> case.arch:3:24
  |
3 |   precision half(bf16, weights = 1 x 128)
  |                        ^^^^^^^^^^^^^^^^^
""",
    ),
    "promote": (
        """
deploy a of Toy {
  precision fp8(e4m3, activations = 1 x 128, weights = 128 x 128, promote = 100)
}
""",
        """
error[E0820]: sums are promoted every 100 elements, and a tile of weights has 128
  --> case.arch:3:67
  |
3 |   precision fp8(e4m3, activations = 1 x 128, weights = 128 x 128, promote = 100)
  |                                                                   ^^^^^^^^^^^^^
  hint: one is a multiple of the other, so that no partial sum mixes two scales
""",
    ),
    "role": (
        """
deploy a of Toy {
  precision fp8(e4m3, weight = 128 x 128, activations = 1 x 128)
}
""",
        """
error[E0803]: a rule for contractions has no 'weight'
  --> case.arch:3:23
  |
3 |   precision fp8(e4m3, weight = 128 x 128, activations = 1 x 128)
  |                       ^^^^^^
  hint: did you mean 'weights'?
""",
    ),
    "format_name": (
        """
deploy a of Toy {
  precision fp8(e4m4, weights = 128 x 128, activations = 1 x 128)
}
""",
        """
error[E0806]: no number format is called 'e4m4'
  --> case.arch:3:17
  |
3 |   precision fp8(e4m4, weights = 128 x 128, activations = 1 x 128)
  |                 ^^^^
  hint: did you mean 'e4m3'?
""",
    ),
    "two_kinds": (
        """
deploy a of Toy {
  precision mx(mxfp8) for contractions, cached
}
""",
        """
error[E0820]: a rule is for contractions, for cached values, for act or for what it names
  --> case.arch:3:41
  |
3 |   precision mx(mxfp8) for contractions, cached
  |                                         ^^^^^^
  ::: case.arch:3:27
  |
3 |   precision mx(mxfp8) for contractions, cached
  |                           ------------ it is for this already
  hint: write a second precision rule
""",
    ),
    "exception": (
        """
deploy a of Toy {
  precision mx(mxfp8) for contractions with a parameter, except embedding
}
""",
        """
error[E0811]: 'Toy' has no parameter, use or value called 'embedding'
  --> case.arch:3:65
  |
3 |   precision mx(mxfp8) for contractions with a parameter, except embedding
  |                                                                 ^^^^^^^^^
  hint: did you mean 'embed'?
""",
    ),
    "kept": (
        """
deploy a of Toy {
  recompute Attention.W
  train batch = 1, sequence = 8
}
""",
        """
error[E0813]: 'W' of 'Attention' is a parameter, not a value or use
  --> case.arch:3:23
  |
3 |   recompute Attention.W
  |                       ^
  ::: toy.arch:7:9
  |
7 |   param W[(h, v), d]
  |         - declared here
""",
    ),
    "both": (
        """
deploy a of Toy {
  train batch = 1, sequence = 8
  serve decode batch_per_rank = 2, context = 8
}
""",
        """
error[E0821]: a deployment trains or serves, not both
  --> case.arch:4:3
  |
4 |   serve decode batch_per_rank = 2, context = 8
  |   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  ::: case.arch:3:3
  |
3 |   train batch = 1, sequence = 8
  |   ----------------------------- first given here
""",
    ),
    "option": (
        """
deploy a of Toy {
  train batch = 1, sequenc = 8
}
""",
        """
error[E0803]: 'train' has no setting 'sequenc'
  --> case.arch:3:20
  |
3 |   train batch = 1, sequenc = 8
  |                    ^^^^^^^
  hint: did you mean 'sequence'?
""",
    ),
    "seconds": (
        """
deploy a of Toy {
  serve decode tpot = 50, context = 8
}
""",
        """
error[E0801]: 'tpot' has no unit
  --> case.arch:3:23
  |
3 |   serve decode tpot = 50, context = 8
  |                       ^^
  hint: write it like 2 us
""",
    ),
    "share": (
        """
deploy a of Toy {
  serve prefill prompt = 8, cache_hits = 130%
}
""",
        """
error[E0805]: 'cache_hits' must be at most 1
  --> case.arch:3:42
  |
3 |   serve prefill prompt = 8, cache_hits = 130%
  |                                          ^^^^
""",
    ),
    "phase": (
        """
deploy a of Toy {
  serve decod context = 8
}
""",
        """
error[E0821]: a deployment serves prefill or decode
  --> case.arch:3:9
  |
3 |   serve decod context = 8
  |         ^^^^^
  hint: did you mean 'decode'?
""",
    ),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_the_whole_message(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert messages(text) == expected
