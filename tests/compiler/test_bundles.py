"""Bundles and the ops over them: what the verifier refuses, and what the loops mean."""

import pytest
import torch

from compiler.interpret import CacheState, Interpreter, RunError
from compiler.ir import Program
from compiler.text import TextError, parse
from compiler.verify import problems

PROGRAM = """\
program p of M
const a = 3
const l = 4

module M of M {
  dim l = l
  child layer[l] = Layer
}

module Layer of Layer {
  dim a = a
  param W : act[a]
}

entry main = M.main(x)

body Layer.call {
  dim t [time] = time
  dim a = a
  %x = input name="x" : act[t, a]
  %W = param param="W" : act[a]
  %y = map(%x, %W) fn="mul" : act[t, a]
  %few = reduce(%x) fn="sum" over=("t") : act[a]
  %both = pack(%y, %few) : bundle[] of "Layer.call:both"
  return %both
}

body M.main {
  dim t [time] = time
  dim s [history] = history
  dim a = a
  dim l = l
  %x = input name="x" : act[t, a]
  %run = loop(%x) body="Layer.call" child="layer" index=`l` dims=() each=() carry=((0, 0)) sum=() reverse=false : bundle[] of "Layer.call:both"
  %last = item(%run) at=0 : act[t, a]
  %sums = item(%run) at=1 : act[l, a]
  %past = as_history(%last) : act[s, a]
  %y = map(%past, %sums) fn="add" : act[s, l, a]
  return %y
}
"""  # noqa: E501


def changed(old: str, new: str) -> Program:
    assert old in PROGRAM
    return parse(PROGRAM.replace(old, new))


def test_a_loop_carries_and_gathers() -> None:
    program = parse(PROGRAM)
    assert not problems(program)
    random = torch.Generator().manual_seed(0)
    weights = {f"layer[{i}].W": torch.rand(3, generator=random) for i in range(4)}
    x = torch.rand(5, 3, generator=random)
    found = Interpreter(program, weights).run("main", {"x": x})
    sums = []
    for weight in weights.values():
        sums.append(x.sum(0))
        x = x * weight
    torch.testing.assert_close(found, x[:, None] + torch.stack(sums))


def test_the_last_number_may_come_first() -> None:
    program = changed("reverse=false", "reverse=true")
    weights = {f"layer[{i}].W": torch.full((3,), float(i + 1)) for i in range(4)}
    found = Interpreter(program, weights).run("main", {"x": torch.ones(1, 3)})
    assert (found[0, :, 0] - 24).tolist() == [24, 12, 4, 1]  # what rounds 0 .. 3 began with


def test_a_history_is_this_steps_alone() -> None:
    interpreter = Interpreter(parse(PROGRAM), {f"layer[{i}].W": torch.ones(3) for i in range(4)})
    state = CacheState(length=2)
    with pytest.raises(RunError, match="2 positions came before: gradients take all at once"):
        interpreter.run("main", {"x": torch.ones(1, 3)}, state=state)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "%sums = item(%run) at=1",
            "%sums = item(%run) at=2",
            "Layer.call:both has 2 values (in module M)",
        ),
        (
            "%sums = item(%run) at=1 : act[l, a]",
            "%sums = item(%run) at=1 : act[a]",
            "value 1 of Layer.call:both is act[] over (a, l), not act[a] (in module M)",
        ),
        (
            "%last = item(%run)",
            "%last = item(%x)",
            "act[t, a] is no bundle (in module M)",
        ),
        (
            'carry=((0, 0)) sum=() reverse=false : bundle[] of "Layer.call:both"',
            'carry=((0, 0)) sum=() reverse=false : bundle[] of "Layer.call:other"',
            "expected bundle[] of Layer.call:both by the rule of loop, found bundle[] of "
            "Layer.call:other",
        ),
        (
            "carry=((0, 0))",
            "carry=((1, 0))",
            "Layer.call takes act[t, a] and gives act[a] (in module M)",
        ),
        (
            "each=() carry",
            "each=(0) carry",
            "the operand act[t, a] has no dim 'l' (in module M)",
        ),
        (
            '%both = pack(%y, %few) : bundle[] of "Layer.call:both"',
            '%both = pack(%y, %few) : bundle[] of "Layer.call:all"',
            "a bundle is named by its pack, not 'Layer.call:all' (in module Layer)",
        ),
        (
            "%past = as_history(%last)",
            "%past = as_history(%sums)",
            "act[l, a] must have one dim of kind time, and act[s, a] one of history (in module M)",
        ),
    ],
)
def test_what_the_verifier_refuses(old: str, new: str, message: str) -> None:
    found = [p.message for p in problems(changed(old, new))]
    assert message in found


def test_a_bundle_says_of_what() -> None:
    with pytest.raises(TextError, match="expected 'of' and found 'the end'"):
        changed(' : bundle[] of "Layer.call:both"\n  %last', " : bundle[]\n  %last")
