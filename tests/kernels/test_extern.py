"""``extern``: a user's own kernel in the place of a function's equations, and held against them."""

from pathlib import Path

import pytest
import torch

import dslc
from backends.triton.generate import generate
from backends.triton.targets import SM_90, SM_100
from compiler.errors import UserError
from dslc import cli
from dslc.program import Program, compile_file

SOURCE = """edition 2026

index t : time

const width = 24

extern fn squash[j](x[j], by[j]) -> y[j] {
  y[j] = x[j] * by[j] / (1 + x[j] * x[j])
  kernel = "own/squash.py:squash" for sm_90, gfx942
}

model Own {
  index d : width, h : 3, n : width / 3, w : 50
  param embed[w, d]
  param gain[d]
  param turn[n]

  def main(token[t] of w) -> logits[t,w] {
    x[t,(h,n)]  = embed[token[t], (h,n)]
    a[t,h,n]    = squash[n](x[t,(h,n)], turn[n])
    b[t,d]      = squash[d](x[t,d], gain[d])
    logits[t,w] = embed[w,d] * b[t,d] + embed[w,(h,n)] * a[t,h,n]
  }
}
"""

KERNEL = """
import torch
import triton
import triton.language as tl


@triton.jit
def squash_kernel(x, by, y, width, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + tl.program_id(0) * width + at, inside, other=0.0).to(tl.float32)
    gain = tl.load(by + at, inside, other=0.0).to(tl.float32)
    tl.store(y + tl.program_id(0) * width + at, value * gain / (1 + value * value), inside)


def squash(x, by):
    assert x.is_contiguous() and x.ndim == 2 and by.ndim == 1
    y = torch.empty_like(x)
    squash_kernel[(x.shape[0],)](x, by, y, x.shape[1], BLOCK=32)
    return y
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "squash.py").write_text(KERNEL)
    file = tmp_path / "own.arch"
    file.write_text(SOURCE)
    return file


def test_the_kernel_is_called_and_gives_what_the_equations_do(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lifted over tokens, and over tokens and heads; the model runs where its directory is."""
    monkeypatch.setattr(Program, "binaries", lambda self, progress=None: [])
    logits = []
    for target in ("cpu", "sm_90"):
        program = compile_file(str(source), target=target, dtype="float32")
        program.save(source.parent / target)
        (source.parent / "own" / "squash.py").rename(source.parent / "own" / "moved.py")
        model = dslc.load(
            source.parent / target, dtype="float32", seed=1, note=lambda sentence: None
        )
        (source.parent / "own" / "moved.py").rename(source.parent / "own" / "squash.py")
        with torch.inference_mode():
            logits.append(model(torch.tensor([[1, 7, 49], [0, 3, 3]])))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    text = (source.parent / "sm_90" / "model.py").read_text()
    assert text.count("kernels.extern_squash_squash(") == 2
    assert (source.parent / "sm_90" / "extern_squash.py").read_text() == KERNEL


def test_another_gpu_computes_the_equations_and_says_so(source: Path) -> None:
    program = compile_file(str(source)).compiled.program
    there, here = generate(program, SM_90, "bfloat16"), generate(program, SM_100, "bfloat16")
    assert [f.op for f in here.fallbacks if f.op == "extern"] == ["extern", "extern"]
    assert [f.op for f in there.fallbacks if f.op == "extern"] == []
    assert "extern" not in here.kernels and not here.externs


def compiled(source: Path, capsys, *options: str) -> tuple[int, str, str]:
    out = source.parent / "out"
    status = cli.run(
        ["compile", str(source), "--target", "sm_90", "--verify", "-o", str(out), *options]
    )
    said, told = (text.replace(str(source.parent), "DIR") for text in capsys.readouterr())
    assert status == 0 or not out.exists()  # nothing half-written
    return status, said, told


# As a user's own product may be: a matrix that changes nothing.
PRODUCT = """
    tile = tl.where(at[:, None] == 0, value[None, :], 0.0).to(tl.bfloat16)
    value = tl.sum(tl.dot(tile, (at[:, None] == at[None, :]).to(tl.bfloat16)), 0)
    gain ="""


def test_verify_holds_it_against_its_equations(source: Path, capsys, monkeypatch) -> None:
    """Triton's interpreter by itself multiplies the bits of bfloat16 as whole numbers."""
    monkeypatch.setattr(Program, "binaries", lambda self, progress=None: [])
    kernel = source.parent / "own" / "squash.py"
    kernel.write_text(KERNEL.replace("\n    gain =", PRODUCT))
    status, said, told = compiled(source, capsys)
    assert status == 0, told
    assert "verified: kernel DIR/own/squash.py:squash is what its equations say" in said


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "(1 + value * value)",
            "(2 + value * value)",
            "error: DIR/own.arch:20: kernel DIR/own/squash.py:squash is not what its equations "
            "say: ",
        ),
        (
            "y = torch.empty_like(x)",
            "raise ValueError('not today')",
            "error: DIR/own.arch:20: kernel DIR/own/squash.py:squash failed: ValueError: not "
            "today\n",
        ),
        (
            "    return y",
            "    return y[:, 1:]",
            "error: DIR/own.arch:20: kernel DIR/own/squash.py:squash gives [3, 7], not [3, 8]\n",
        ),
    ],
)
def test_a_kernel_that_is_off_is_refused(source: Path, old, new, message, capsys) -> None:
    file = source.parent / "own" / "squash.py"
    file.write_text(file.read_text().replace(old, new))
    status, _, told = compiled(source, capsys)
    assert status == 1 and message in told


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("own/squash.py", "own/lost.py", "kernel file DIR/own/lost.py: No such file or directory"),
        (":squash", ":squish", "kernel file DIR/own/squash.py has no function 'squish'"),
        ("sm_90, gfx942", "sm_90, sm90", "a kernel is for 'sm90', and targets are sm_80, sm_89"),
    ],
)
def test_what_is_named_has_to_be_there(source: Path, old, new, message) -> None:
    source.write_text(SOURCE.replace(old, new))
    program = compile_file(str(source)).compiled.program
    with pytest.raises(UserError) as refused:
        generate(program, SM_90, "bfloat16")
    said = str(refused.value).replace(str(source.parent), "DIR")
    assert said.startswith(("DIR/own.arch:20: ", "DIR/own.arch:21: ")) and message in said


def test_a_kernel_is_a_function_of_a_file(source: Path, capsys) -> None:
    source.write_text(SOURCE.replace("squash.py:squash", "squash"))
    assert cli.run(["check", str(source)]) == 1
    said = capsys.readouterr().err
    assert 'a kernel is a function of a file: "kernels/file.py:function"' in said


def test_words_stay_names_elsewhere(tmp_path: Path) -> None:
    """``extern`` and ``kernel`` are words only where such a function is declared."""
    file = tmp_path / "names.arch"
    file.write_text(
        "edition 2026\nindex t : time\nconst extern = 4\n"
        "model M {\n  index d : extern\n  param kernel[d]\n"
        "  def main(x[t,d]) -> y[t,d] {\n    let a[t,d] = x[t,d]\n    y[t,d] = kernel[d] * a[t,d]\n"
        "  }\n}\n"
    )
    assert compile_file(str(file)).name == "M"
