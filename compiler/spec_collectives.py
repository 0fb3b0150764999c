"""Rows of the spec table for what ranks do together; the ``shard`` pass writes these ops.

``axes`` are mesh axes, the first outermost. The ops between ranks say what one rank gets.
"""

from __future__ import annotations

from dataclasses import replace

from compiler import collectives
from compiler.spec import NAME, NAMES, WHOLE, Attr, Op, one_of, optional, register

TRUTH = Attr("a bool", lambda v: isinstance(v, bool))
FUNCTIONS = frozenset({"sum", "mean", "max", "min"})

BETWEEN_RANKS = frozenset(
    {"all_reduce", "reduce_scatter", "all_gather", "routing", "dispatch", "combine"}
)

# fmt: off
for _row in (
    Op("all_reduce", "partial results of the ranks along some axes, put together on each", 1, 1,
       collectives.all_reduce, {"axes": NAMES, "fn": one_of(FUNCTIONS)}),
    Op("reduce_scatter", "partial sums put together, each rank getting its part of a dim", 1, 1,
       collectives.reduce_scatter, {"axes": NAMES, "dim": NAME}),
    Op("all_gather", "a divided dim made whole on each rank", 1, 1,
       collectives.all_gather, {"axes": NAMES, "dim": NAME}),
    Op("part_of", "a rank's part of a dim; nothing is sent", 1, 1,
       collectives.part, {"axes": NAMES, "dim": NAME}, view=True),
    Op("gather_part", "rows of a table whose rows are divided; 0 for those of other ranks", 2, 2,
       collectives.gather_part, {"axes": NAMES, "dim": NAME}),
    Op("routing", "where picks are sent along `sent`, and which of a rank's blocks each row that "
       "arrives is for; of ranks along other axes, each takes the picks of its own blocks", 2, 2,
       collectives.route,
       {"axes": NAMES, "sent": NAMES, "redundant": WHOLE, "child": NAME, "picks": NAME,
        "per_node": WHOLE}),
    Op("dispatch", "rows sent to the ranks that have their blocks", 3, 3, collectives.dispatch),
    Op("combine", "results sent back, and their sum over `picks`, weighted with the gate", 4, 4,
       collectives.combine, {"picks": NAME}),
    Op("wait", "what was started, once it has arrived", 1, 1, collectives.wait),
):
    # What is in flight (`starts`) is read by a `wait` alone; a routing by what sends along it.
    own = {**_row.attrs, "starts": optional(TRUTH)} if _row.name in BETWEEN_RANKS else _row.attrs
    register(replace(_row, attrs=own, meaning=f"semantics_ranks.{_row.name}"))
# fmt: on
