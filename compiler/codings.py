"""The codings of a whole program, changed at once: for checks on small instances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from compiler.coding import Coding
from compiler.ir import Graph, Program

SIDE = 2  # of a tile in a small instance: dims of 3 to 7 then have several tiles, the last partial


def with_small_tiles(program: Program) -> Program:
    """The same with tiles of two elements where they had more, so that small dims have several.

    What a pass does may not depend on the size of a tile.
    """

    def side(length: int | None) -> int | None:
        return length if length is None else min(length, SIDE)

    def small(coding: Coding) -> Coding:
        return replace(coding, rows=side(coding.rows), columns=side(coding.columns))

    return _changed(program, small)


def without_codings(program: Program) -> Program:
    """A program in which `select-fp8` chose contractions, as if it had chosen none."""
    bodies = {}
    for name, graph in program.bodies.items():
        made = Graph(name)
        for node in graph:
            if node.op == "scaled_contract":
                node = node.with_(op="contract", attrs={"over": node.attrs["over"]})
            made.add(node)
        made.output = graph.output
        bodies[name] = made
    modules = {
        name: replace(m, parameters=tuple(replace(p, coding=None) for p in m.parameters))
        for name, m in program.modules.items()
    }
    return replace(program, modules=modules).with_bodies(bodies)


def is_coded(program: Program) -> bool:
    return any(p.coding for m in program.modules.values() for p in m.parameters) or any(
        n.op in ("scaled_contract", "quantize") for g in program.bodies.values() for n in g
    )


def _changed(program: Program, change: Callable[[Coding], Coding]) -> Program:
    def value(item: Any) -> Any:
        if isinstance(item, Coding):
            return change(item)
        return tuple(value(i) for i in item) if isinstance(item, tuple) else item

    bodies = {}
    for name, graph in program.bodies.items():
        made = Graph(name)
        for node in graph:
            attrs = {key: value(item) for key, item in node.attrs.items()}
            if "promote" in attrs:
                attrs["promote"] = SIDE
            type = replace(node.type, coding=value(node.type.coding))
            made.add(node.with_(attrs=attrs, type=type))
        made.output = graph.output
        bodies[name] = made
    modules = {
        name: replace(m, parameters=tuple(replace(p, coding=value(p.coding)) for p in m.parameters))
        for name, m in program.modules.items()
    }
    return replace(program, modules=modules).with_bodies(bodies)
