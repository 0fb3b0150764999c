"""Models compiled for a GPU, interpreted, against the same models compiled for the CPU."""

from pathlib import Path

import pytest
import torch
from running_kernels import rounding  # noqa: F401  the interpreter's conversions are mended

import dslc
from dslc.program import Program, compile_file

PLACE = {"device": "cpu", "note": lambda sentence: None}


@pytest.fixture(autouse=True)
def nothing_ahead(monkeypatch) -> None:
    """The interpreter takes no binaries."""
    monkeypatch.setattr(Program, "binaries", lambda self, progress=None: [])


def both(folder: Path, file: str, dtype: str, **choices):
    """One model twice, weights and dtype the same: on the CPU, and with a GPU's kernels."""
    models = []
    for target in ("cpu", "sm_90"):
        program = compile_file(file, target=target, dtype=dtype, **choices)
        program.save(folder / target)
        models.append(dslc.load(folder / target, dtype=dtype, seed=1, **PLACE))
    return models


# float32 first: there nothing hides. bfloat16 rounds at other places.
@pytest.mark.parametrize(("dtype", "near"), [("float32", 2e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("file", ["dsv3"])
def test_logits_agree(file: str, dtype: str, near: float, tmp_path: Path) -> None:
    plain, gpu = both(tmp_path, file, dtype, dims="small")
    tokens = torch.randint(0, 500, (2, 7), generator=torch.manual_seed(0))
    lengths = torch.tensor([7, 4])
    want, got = (m(tokens, lengths=lengths).float() for m in (plain, gpu))
    for row, length in enumerate(lengths):
        want_row, got_row = want[row, :length], got[row, :length]
        assert (want_row - got_row).abs().max() <= near * want_row.abs().max()
