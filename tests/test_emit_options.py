"""Options of `dslc compile` that `--emit` has no use for are refused, not ignored."""

import pytest

from dslc import cli


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--emit", "pytorch", "--after", "order"),
            "--after says which graph is printed, and --emit pytorch prints none",
        ),
        (
            ("--emit", "graph", "--json"),
            "--json tells what was written; --emit prints text and writes nothing",
        ),
        (
            ("--after", "order", "--json"),
            "--json tells what was written; --emit prints text and writes nothing",
        ),
    ],
)
def test_options_that_would_be_ignored(capsys, options, said):
    assert cli.run(["compile", "dsv3", *options]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {said}\n")
