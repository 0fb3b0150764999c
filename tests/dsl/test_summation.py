"""The rule of summation: what each product sums, written out."""

from __future__ import annotations

from pathlib import Path

import pytest
from meaning import meaning

from dsl.diagnostics import DiagnosticError

# equation, its inputs, its meaning
SUMS = [
    # An index in two factors that the left lacks is summed.
    ("y[t,f] = W[f,d] * x[t,d]", "x[t,d]", "sum[d](W[f, d] * x[t, d])"),
    ("y[t] = x[t,d] * x[t,d]", "x[t,d]", "sum[d](x[t, d] * x[t, d])"),
    # One that the left has is not.
    ("y[t,d] = x[t,d] * x[t,d]", "x[t,d]", "x[t, d] * x[t, d]"),
    ("y[t,d] = gain[d] * x[t,d]", "x[t,d]", "gain[d] * x[t, d]"),
    # Three operands, each index where it belongs; parentheses that change nothing.
    (
        "y[t] = x[t,d] * U[d,f] * bias[f]",
        "x[t,d]",
        "sum[d, f](x[t, d] * U[d, f] * bias[f])",
    ),
    (
        "y[t] = x[t,d] * (U[d,f] * bias[f])",
        "x[t,d]",
        "sum[d, f](x[t, d] * U[d, f] * bias[f])",
    ),
    # Division is a product with the reciprocal, whose denominator is a scope of its own.
    ("y[t,d] = x[t,d] / sum[d](x[t,d])", "x[t,d]", "x[t, d] * 1 / sum[d](x[t, d])"),
    (
        "y[t,d] = x[t,d] / (gain[d] * gain[d])",
        "x[t,d]",
        "x[t, d] * 1 / (gain[d] * gain[d])",
    ),
    # Terms of a sum are scopes of their own.
    (
        "y[t,f] = W[f,d] * x[t,d] + bias[f]",
        "x[t,d]",
        "add(sum[d](W[f, d] * x[t, d]), bias[f])",
    ),
    (
        "y[t,f] = bias[f] * (W[f,d] * x[t,d] + bias[f])",
        "x[t,d]",
        "bias[f] * add(sum[d](W[f, d] * x[t, d]), bias[f])",
    ),
    # So are the arguments of functions.
    (
        "y[t,f] = sigmoid(W[f,d] * x[t,d]) * bias[f]",
        "x[t,d]",
        "sigmoid(sum[d](W[f, d] * x[t, d])) * bias[f]",
    ),
    # What a reducer, softmax or top works on counts as standing on the left of its argument.
    ("y[t] = sum[d](x[t,d] * gain[d])", "x[t,d]", "sum[d](x[t, d] * gain[d])"),
    ("y[t] = max[d](x[t,d] * gain[d])", "x[t,d]", "max[d](x[t, d] * gain[d])"),
    ("y[t,d] = softmax[d](x[t,d] * gain[d])", "x[t,d]", "softmax[d](x[t, d] * gain[d])"),
    (
        "y[t,n|j] = concat[n|j](x[t,n] * x[t,n], z[t,j])",
        "x[t,n], z[t,j]",
        "concat[n|j](x[t, n] * x[t, n], z[t, j])",
    ),
    # Parts of a sum and of a product of indices.
    ("y[t,h,n] = Q[(h,n),d] * x[t,d]", "x[t,d]", "sum[d](Q[(h, n), d] * x[t, d])"),
    ("y[t,h,n|j] = Q[(h,n|j),d] * x[t,d]", "x[t,d]", "sum[d](Q[(h, n|j), d] * x[t, d])"),
    ("y[t,d] = O[d,(h,v)] * x[t,h,v]", "x[t,h,v]", "sum[h, v](O[d, (h, v)] * x[t, h, v])"),
    # An index that stands for a product, in either spelling.
    ("y[t,e] = C[e,d] * x[t,d]", "x[t,d]", "sum[d](C[e, d] * x[t, d])"),
    ("y[t,g] = max[m](C[(g,m),d] * x[t,d])", "x[t,d]", "max[m](sum[d](C[(g, m), d] * x[t, d]))"),
    # A subscript counts as standing in the factor.
    (
        "pick[t,k] = argtop[e -> k](x[t,e])\n    y[t,d] = C[pick[t,k],d] * z[t,k]",
        "x[t,e], z[t,k]",
        "sum[k](C[pick[t, k], d] * z[t, k])",
    ),
    # Numbers and constants go with anything.
    ("y[t,d] = 2 * x[t,d] - 1", "x[t,d]", "sub(2 * x[t, d], 1)"),
    ("y[t,d] = x[t,d] * hidden ^ -0.5", "x[t,d]", "x[t, d] * hidden ^ -0.5"),
]


@pytest.mark.parametrize(
    ("equation", "inputs", "expected"),
    SUMS,
    ids=[equation for equation, _, _ in SUMS],
)
def test_what_is_summed(equation: str, inputs: str, expected: str, tmp_path: Path) -> None:
    assert meaning(tmp_path / "b.arch", equation, inputs) == expected


@pytest.mark.parametrize(
    ("equation", "code"),
    [
        ("y[t] = x[t,d]", "E0405"),  # d stands once, and not on the left
        ("y[t,d] = W[f,d] * x[t,d]", "E0407"),  # a matrix product that sums nothing
        ("y[t,f,d] = W[f,d] * x[t,d]", "E0407"),
        ("y[t,f] = x[t,d] * (U[d,f] * gain[d])", "E0408"),  # parentheses would change the sum
        ("y[t,h,d] = x[t,d] + x[t,d]", "E0406"),  # h is nowhere on the right
        ("z[t] = sum[d](x[t,d])\n    y[t,d] = x[t,d] + z[t] * z[t]", "E0406"),  # a term without d
        ("y[d] = sum[t](x[t,d])", "E0411"),
        ("y[d] = x[t,d] * x[t,d]", "E0411"),
    ],
)
def test_nothing_is_summed_or_repeated_by_chance(equation: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError) as raised:
        meaning(tmp_path / "b.arch", equation)
    assert [d.code for d in raised.value.diagnostics] == [code]
