"""Transfers that are started and waited for, and two micro-batches that take turns."""

import re
from dataclasses import replace

import pytest

from compiler.equivalence import equivalent
from compiler.ir import Turn
from compiler.parse import parse
from compiler.passes.turn_taking import Piece, Scheduler
from compiler.pipeline import compile_model
from compiler.text import TextError, program_text, same
from compiler.verify import problems
from dsl.constants import Choices

DEPLOYMENTS = """
edition 2026
import dsv3
deploy turns of DeepSeekV3 from ep2 { overlap two_microbatches }
deploy crossed of DeepSeekV3 from tp2ep2 { overlap two_microbatches }
deploy coded of DeepSeekV3 from fp8 {
  mesh ep = 2  shard batch -> ep, MoE.expert -> ep  overlap two_microbatches
}
"""
LAYER = "Sparse.call"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    file = tmp_path_factory.mktemp("turns") / "turns.arch"
    file.write_text(DEPLOYMENTS)
    return lambda name: compile_model(str(file), Choices(preset="small"), deploy=name)


@pytest.fixture(scope="module")
def program(compiled):
    return compiled("turns").after("overlap")


def layer(program, turns):
    graph = program.bodies[LAYER]
    changed = replace(
        program, bodies={**program.bodies, LAYER: parse(program_text(program)).bodies[LAYER]}
    )
    changed.bodies[LAYER].turns = tuple(turns(list(graph.turns)))
    return [problem.message for problem in problems(changed)]


@pytest.mark.parametrize("name", ["turns", "crossed"])
def test_the_pass_changes_no_result(compiled, name):
    stages = compiled(name)
    equivalent(stages.after("fp8"), stages.after("overlap"))  # on every rank


def test_the_text_has_the_turns_and_parses_back(program):
    text = program_text(program)
    assert same(parse(text), program)
    assert re.search(r"^  turn before$", text, re.MULTILINE)
    with pytest.raises(TextError, match="'third' is no micro-batch"):
        parse(text.replace("turn before", "turn third"))


def test_rows_and_sums_are_in_flight_while_the_other_micro_batch_computes(program):
    """Between a start and its wait, each has something else to do; the second one's sums arrive
    in the next layer's time."""
    graph = program.bodies[LAYER]
    order = [(turn.who, name) for turn in graph.turns for name in turn.nodes]
    for who in ("first", "second"):
        for node in (n for n in graph if n.op == "wait"):
            end = (who, node.name) if (who, node.name) in order else ("later", node.name)
            between = order[order.index((who, node.inputs[0])) + 1 : order.index(end)]
            work = {graph[name].op for _, name in between}
            assert work & {"call", "apply"} or end[0] == "later", (who, node.name)


def test_a_step_of_one_micro_batch_hides_the_shared_expert(program):
    ops = [(n.op, n.attrs.get("child", "")) for n in program.bodies[LAYER]]
    dispatch, wait = ops.index(("dispatch", "")), ops.index(("wait", ""))
    assert ("call", "mlp.shared") in ops[dispatch:wait]


def test_codes_are_what_is_in_flight(compiled):
    graph = compiled("coded").after("overlap").bodies[LAYER]
    (sent,) = (n for n in graph if n.op == "dispatch")
    assert sent.attrs["starts"] and sent.type.dtype == "coded"


def test_bodies_do_not_grow_with_layers(program, tmp_path):
    file = tmp_path / "deep.arch"
    file.write_text(DEPLOYMENTS)
    deep = compile_model(str(file), Choices(preset="small", set={"layers": 40}), deploy="turns")
    assert len(deep.after("overlap").bodies[LAYER]) == len(program.bodies[LAYER])


def test_a_node_that_no_turn_runs_is_told(program):
    def without(turns):
        return [Turn(t.who, t.nodes[1:] if t.who == "first" else t.nodes) for t in turns]

    found = layer(program, without)
    assert "no turn of the first micro-batch runs %1" in found
    assert "turn first: %1 is not there yet" in found


def test_a_value_is_read_too_early_in_a_turn(program):
    found = layer(program, lambda turns: [t for t in turns if t.who != "before"])
    assert found == ["a turn 'later' needs a turn 'before', and there is one at most"]
    swapped = layer(program, lambda turns: [*turns[:-1][::-1], turns[-1]])
    assert any("is not there yet" in message for message in swapped)


def test_nothing_in_flight_is_read_without_a_wait(program):
    text = program_text(program)
    broken = re.sub(r"%x\.rows = wait\(%x\.rows\.sent\)", "%x.rows = cast(%x.rows.sent)", text)
    (problem,) = problems(parse(broken))
    assert problem.message == "%x.rows.sent is read while it is in flight, without a wait"


# -- the scheduler ---------------------------------------------------------------------------------


def chain(*seconds):
    """Work, transfer, work, transfer, ... each after the one before."""
    return [
        Piece((str(i),), s, i % 2 == 1, frozenset({i - 1} if i else ()))
        for i, s in enumerate(seconds)
    ]


def test_two_micro_batches_hide_all_that_can_be_hidden():
    work = chain(4.0, 4.0, 4.0, 4.0, 0.0)
    one, two = Scheduler(work, 1), Scheduler(work, 2)
    assert one.best().seconds == 16.0  # nothing else to do meanwhile
    assert two.bound == 16.0
    assert two.best().seconds == pytest.approx(16.0)  # for both


def test_an_order_needs_no_more_memory_than_there_is():
    work = [replace(p, bytes=8.0) for p in chain(4.0, 2.0, 4.0, 2.0, 0.1)]
    scheduler = Scheduler(work, 2)
    free = scheduler.best()
    tight = scheduler.best(limit=free.peak - 1)
    assert tight.peak < free.peak
    assert tight.seconds >= free.seconds
