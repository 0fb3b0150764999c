"""What a plan's kernels do backward is what the backward graph computes."""

import pytest

from compiler.passes import recompute
from compiler.planning.backward import backward_work
from compiler.planning.training import Training
from compiler.training_costs import costs
from tests.planning.planned import compiled, subject

TRAINS = (
    "deploy mine of {model} on h100 {{ mesh dp = 8  shard batch -> dp, optimizer -> replicas"
    "  {recompute}  train batch = 64, sequence = {sequence} }}"
)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A model under a training deployment of its own."""
    from compiler.pipeline import compile_model
    from compiler.planning.model import Subject
    from dsl.deploy.check import choose

    def make(file: str, clause: str = "", sequence: int = 4096) -> Subject:
        name = compiled(file).program.name
        path = tmp_path / "mine.arch"
        text = TRAINS.format(model=name, recompute=clause, sequence=sequence)
        path.write_text(f"edition 2026\nimport {file}\nimport clusters\n{text}\n")
        done = compile_model(str(path))
        return Subject(done.after("elaborate"), done.program, choose(done.source, "mine"))

    return make


def summed(training: Training, entry: str = "main") -> tuple[float, float, float, float]:
    """FLOPs of all kernels of one rank and one micro-batch: forward, input, weight, again."""
    forward = inputs = weight = again = 0.0
    for block in training.model.blocks:
        if block.piece.entry != entry:
            continue
        times = max(1, len(block.piece.layers))
        for kernel in block.kernels:
            found = kernel.gradient
            if found is None or kernel.kind == "memory":
                continue
            forward += times * kernel.flops
            inputs += times * found.inputs
            weight += times * found.weight
            again += times * (found.inside + found.again * kernel.flops)
    return forward, inputs, weight, again


def test_the_published_training_step_computes_what_its_backward_graph_does():
    """Input and weight parts apart, and what the deployment computes again: one micro-batch of the
    main model, over all stages; routed experts get as many rows as a rank sends."""
    about = subject("pretrain")
    training = Training(about)
    whole = costs(compiled().trained, 4096, "main", recompute.of(about.final, about.deployment))
    work = whole.total
    found = summed(training)  # gates are no matrix products: bound by memory, and not in it
    assert found == pytest.approx((work.forward, work.input, work.weight, work.again), rel=2e-3)


def test_what_no_gradient_reaches_has_no_backward_kernel(trained):
    """DeepSeek-V3.2's indexer decides what is looked at; no gradient of this loss goes there."""
    training = Training(trained("dsv3_2"))
    kernels = [k for b in training.model.blocks for k in b.kernels if k.flops]
    index = [k for k in kernels if k.gradient is not None and not k.gradient.reached]
    assert index and all(backward_work(k, 4.0) == ([], []) for k in index)
    work = costs(compiled("dsv3_2").trained, 4096).total
    forward, inputs, weight, _ = summed(training)
    assert inputs + weight < 1.95 * forward
    assert (inputs + weight) / forward == pytest.approx(
        (work.input + work.weight) / work.forward, rel=0.01
    )


@pytest.mark.parametrize("file", ["llama3", "qwen3_moe"])
def test_a_layer_that_is_computed_again_runs_once_more(trained, file):
    """Activation checkpointing of whole layers: every product of theirs forward once more."""
    plain, again = (
        summed(Training(trained(file))),
        summed(Training(trained(file, "recompute Layer"))),
    )
    assert again[:3] == pytest.approx(plain[:3])
    assert 0.8 * plain[0] < again[3] - plain[3] <= plain[0]  # but the head


def test_training_takes_no_contraction_apart_however_short_its_sequences(trained):
    """Below 163 positions a program that serves absorbs W_ukv, which has no backward graph."""
    about = trained("dsv3", sequence=100)
    work = costs(compiled().trained, 100, "main").total
    forward, inputs, weight, _ = summed(Training(about))
    assert (forward, inputs, weight) == pytest.approx(
        (work.forward, work.input, work.weight), rel=2e-3
    )
