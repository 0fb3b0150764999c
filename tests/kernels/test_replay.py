"""Decoding by graphs that are replayed: what is captured asks the host for nothing.

Without a GPU a stand-in captures: it runs the step again where a graph would be replayed, on the
same buffers, and refuses whatever a capture could not hold.
"""

import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import dslc
from backends.pytorch.replay import padded
from backends.pytorch.runtime.paged import BLANK, OWN, PAGE, SCRAP, PagedCache
from dslc.program import Program, compile_file

PLACE = {"device": "cpu", "note": lambda sentence: None}
ON_GPU = os.environ.get("TRITON_INTERPRET") == "0"


class Captured(TorchDispatchMode):
    """What CUDA refuses in a capture: values read by the host, shapes that depend on values, and
    tensors made of the host's numbers."""

    REFUSED = re.compile(
        r"_local_scalar_dense|nonzero|masked_select|unique|repeat_interleave\.Tensor|lift_fresh"
        r"|aten\.equal"
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.REFUSED.search(str(function)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def kernels_are_launched(monkeypatch) -> None:
    """What the interpreter does within a kernel is no part of the capture."""
    monkeypatch.setattr(Program, "binaries", lambda self, progress=None: [])
    run = interpreter.GridExecutor.__call__

    def launched(self, *args, **options):
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)


class Stand:
    """Captures by remembering."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, run):
        self.captured += 1
        with Captured():
            result = run()
        return Again(self, run, result), result


class Again:
    def __init__(self, stand, run, result):
        self.stand, self.run, self.result = stand, run, result

    def replay(self) -> None:
        self.stand.replayed += 1
        with Captured():
            self.result.copy_(self.run())


def model(folder: Path, file: str = "dsv3", **choices):
    """In bfloat16: float32 leaves products to torch, which asks how many rows an expert has."""
    program = compile_file(file, target="sm_90", dims="small", **choices)
    program.save(folder / "model")
    return dslc.load(folder / "model", dtype="bfloat16", seed=1, **PLACE)


SMALL = {
    "layers": 2,
    "dense": 1,
    "hidden": 128,
    "vocab": 131,
    "heads": 2,
    "ffn": 128,
    "expert_ffn": 32,
}
PROMPTS = torch.randint(0, 131, (3, 70), generator=torch.manual_seed(0), device="cpu")
LENGTHS = torch.tensor([62, 3, 1], device="cpu")


@pytest.mark.skipif(ON_GPU, reason="a stand-in for graphs; the GPU has its own")
def test_replayed_steps_give_the_same_tokens(tmp_path: Path) -> None:
    """Prompts of three lengths, a page that fills up on the way, a sequence that ends early."""
    found = model(tmp_path, set=SMALL)
    asked = {"lengths": LENGTHS, "max_new_tokens": 7}
    plain = found.generate(PROMPTS, cache=found.new_cache(3, 80), **asked)
    stop = int(plain[1][-4])
    expected = found.generate(PROMPTS, cache=found.new_cache(3, 80), eos=stop, **asked)
    found.replays.capture = stand = Stand()
    cache = found.new_cache(3, 80)
    replayed = found.generate(PROMPTS, cache=cache, eos=stop, **asked)
    assert [r.tolist() for r in replayed] == [e.tolist() for e in expected]
    assert stand.captured and stand.replayed >= 2
    assert cache.lengths == [len(r) - 1 for r in replayed]
    assert len(cache.pages_of(0)) == 2 and len(cache.pages_of(1)) == 1


@pytest.mark.skipif(ON_GPU, reason="a stand-in for graphs; the GPU has its own")
def test_codes_are_replayed_too(tmp_path: Path) -> None:
    found = model(tmp_path, set=SMALL, deploy="fp8")
    asked = {"max_new_tokens": 5}
    expected = found.generate(PROMPTS[:2, :3], **asked)
    found.replays.capture = stand = Stand()
    assert torch.equal(found.generate(PROMPTS[:2, :3], **asked), expected)
    assert stand.replayed == 2  # four steps, of which two are run to warm up


@pytest.mark.skipif(ON_GPU, reason="a stand-in for graphs; the GPU has its own")
def test_a_model_that_cannot_be_captured_is_told_and_run(tmp_path: Path) -> None:
    """A state that is kept from token to token is torch's, which asks how far sequences are."""
    found = model(tmp_path, "qwen3_next")
    expected = found.generate(PROMPTS[:1, :4], max_new_tokens=5)
    found.replays.capture = Stand()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(found.generate(PROMPTS[:1, :4], max_new_tokens=5), expected)
    (told,) = [str(w.message) for w in said if "graph" in str(w.message)]
    assert told == (
        "decoding takes no CUDA graph: a step's 'history' depends on how long the histories are"
    )


@pytest.mark.skipif(ON_GPU, reason="a stand-in for graphs; the GPU has its own")
def test_weights_that_moved_are_captured_again(tmp_path: Path) -> None:
    found = model(tmp_path, set=SMALL)
    found.replays.capture = stand = Stand()
    cache = found.new_cache(1, 40)
    found.generate(PROMPTS[:1, :4], max_new_tokens=5, cache=cache)
    assert stand.captured == 1
    found.to(torch.bfloat16)
    found.generate(PROMPTS[:1, :5], max_new_tokens=5, cache=cache)
    assert stand.captured == 2


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs take a GPU: make gpu")
def test_graphs_on_this_gpu(tmp_path: Path) -> None:
    program = compile_file("dsv3", target="cuda", dtype="bfloat16", dims="small", set=SMALL)
    program.save(tmp_path / "model")
    found = dslc.load(tmp_path / "model", seed=1, device="cuda", note=lambda sentence: None)
    found.replays.enabled = False
    expected = found.generate(PROMPTS, lengths=LENGTHS, max_new_tokens=12)
    found.replays.enabled = True
    replayed = found.generate(PROMPTS, lengths=LENGTHS, max_new_tokens=12)
    assert found.replays.reason is None
    assert [r.tolist() for r in replayed] == [e.tolist() for e in expected]


def test_sizes_are_few() -> None:
    assert [padded(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 100)] == [1, 2, 4, 8, 8, 16, 16, 32, 112]


# -- pages -----------------------------------------------------------------------------------------


def test_pages_lie_anywhere() -> None:
    """Slots take pages in turns; what one gives back, blank again, is the next that is taken."""
    cache = PagedCache(2)
    x = torch.ones(1, 3)
    for positions in (1, PAGE + 1):
        for slot in (0, 1):
            cache.claim(slot, positions)
    memory = cache.memory("c", x)
    assert [cache.pages_of(slot) for slot in (0, 1)] == [(2, 4), (3, 5)]
    memory[list(cache.pages_of(0))] = 1
    cache.commit([0, 1], [PAGE + 1, PAGE + 1])
    cache.truncate([3], [0])
    assert cache.pages_of(0) == (2,)
    assert memory[2].sum() == 3 * 3 and memory[4].sum() == 0
    cache.claim(1, 3 * PAGE)
    assert cache.pages_of(1) == (3, 5, 4)
    table = cache.table(torch.device("cpu"))
    assert table[0, :2].tolist() == [2, BLANK]
    assert table[1, :3].tolist() == [3, 5, 4]
    assert table[2].unique().tolist() == [SCRAP] and min(2, 3, 4, 5) >= OWN


def test_more_pages_hold_what_there_was() -> None:
    cache = PagedCache(1)
    cache.claim(0, 1)
    memory = cache.memory("c", torch.ones(1, 3))
    memory[cache.pages_of(0)[0], 0] = 7
    before = cache.version
    cache.claim(0, 20 * PAGE)
    assert cache.version > before
    grown = cache.memory("c", torch.ones(1, 3))
    assert len(grown) > len(memory) and grown[cache.pages_of(0)[0], 0].tolist() == [7, 7, 7]
    assert len(set(cache.pages_of(0))) == 20


def test_a_cache_of_fixed_room_has_its_pages_from_the_start() -> None:
    cache = PagedCache(2, capacity=100)
    x = torch.ones(1, 3)
    memory = cache.memory("c", x)
    cache.claim(0, 100)
    cache.claim(1, 100)
    assert cache.memory("c", x) is memory
    with pytest.raises(dslc.UserError, match="made for 100 positions per sequence, and 101 are"):
        cache.claim(0, 101)
