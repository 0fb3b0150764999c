"""--verify finds what a pass broke, and says where."""

import re

import pytest
import torch
from decoder import decoder

from compiler.equivalence import NotEquivalent, difference, equivalent

# The same scores, one side with the sum taken apart: what contraction order may do.
BRANCH = (
    '%y = branch(%x) when=("time", "<=", 2) then="few" otherwise="many" : act[t, d] as y rounds'
)
ADD = '%y = map(%x, %h) fn="add" : act[t, d] as y rounds\n  return %y\n}\n\nbody Attention'


def sides(few: str) -> tuple[str, str]:
    """The residual of a dense layer computed in one of two bodies, of which ``few`` says one."""
    body = """\
body {name} {{
  dim t [time] = time
  dim d = hidden
  %x = input name="x" : act[t, d]
  %h = input name="h" : act[t, d]
  {sum}
  return %y
}}

"""
    bodies = body.format(name="few", sum=few)
    bodies += body.format(name="many", sum='%y = map(%x, %h) fn="add" : act[t, d]')
    branch = BRANCH.replace("branch(%x)", "branch(%x, %h)")
    return ADD, f"{branch}\n  return %y\n}}\n\n{bodies}body Attention"


def test_a_program_equals_itself() -> None:
    equivalent(decoder(), decoder())


def test_another_order_is_the_same() -> None:
    equivalent(decoder(), decoder(sides('%y = map(%h, %x) fn="add" : act[t, d]')))


def test_a_side_that_its_guard_never_lets_run_is_checked_too() -> None:
    never = decoder(sides('%y = map(%x, %h) fn="sub" : act[t, d]'), ('"<=", 2', '"<=", 0'))
    with pytest.raises(NotEquivalent, match="'then' of each branch: the results differ"):
        equivalent(decoder(), never)


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        ("value=0.5", "value=0.5000001", r"layers\[0\].attn.score"),
        ('"le"', '"lt"', r"layers\[0\].attn.p"),
        ('fn="tanh"', 'fn="sin"', r"layers\[1\].ffn\[\d\].act"),
        ('count=<open_groups>', 'count=<groups>', r"layers\[1\].open"),
        ("%kv = contract(%W_kv, %x)", "%kv = contract(%W_kv, %x, %x)", r"layers\[0\].attn.c"),
    ],
)  # fmt: skip
def test_the_first_value_that_differs_is_named(old: str, new: str, first: str) -> None:
    with pytest.raises(NotEquivalent) as error:
        equivalent(decoder(), decoder((old, new)))
    assert "entry main, positions 0 .. 7: the results differ by" in str(error.value)
    assert re.search(f"the first named value that differs is {first}, by", str(error.value))


def test_the_line_of_the_value_is_named() -> None:
    with pytest.raises(NotEquivalent, match=r"attn\.c, by .*\(toy\.arch:31\)"):
        equivalent(decoder(), decoder(("%c = cache(%kv)", "%minus = map(%kv) fn=\"neg\" : "
                                       "act[t, n|j]\n  %c = cache(%minus)")))  # fmt: skip


def test_a_second_entry_is_run_too() -> None:
    with pytest.raises(NotEquivalent, match="entry after, positions 0"):
        equivalent(decoder(), decoder(('%x1, %2) fn="add"', '%x1, %2) fn="sub"')))


def test_what_only_shows_with_a_history_is_found() -> None:
    """Numbers from 0 are the positions of a prompt, and not those of a chunk after it."""
    numbered = ("%at = position : i64[t]", "%at = iota : i64[t] of t")
    with pytest.raises(NotEquivalent, match=r"entry main, positions 3 \.\. 5: "):
        equivalent(decoder(), decoder(numbered))


def test_difference_is_relative_and_minds_infinities() -> None:
    inf = torch.inf
    assert difference(torch.tensor([1.0, -inf]), torch.tensor([1.0, -inf])) == 0
    assert difference(torch.tensor([1.0, 1.0]), torch.tensor([1.0, -inf])) == inf
    assert difference(torch.tensor([inf]), torch.tensor([-inf])) == inf
    assert difference(torch.tensor([2.0]), torch.tensor([4.0])) == 0.5
    assert difference(torch.zeros(2), torch.zeros(3)) == inf
    assert difference(torch.zeros(2), torch.zeros(2)) == 0
    assert difference(torch.ones(2), torch.zeros(2)) == inf
    assert difference(torch.zeros(0), torch.zeros(0)) == 0
