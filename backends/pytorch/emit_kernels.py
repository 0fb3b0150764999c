"""What the emitter asks of a target that has kernels of its own: which nodes one call computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from backends.pytorch.emit_values import Value
from compiler.ir import Graph, Node, Program

if TYPE_CHECKING:
    from backends.pytorch.emit_body import Body


@dataclass(frozen=True)
class Group:
    """Nodes that one call computes.

    Attributes:
        root: the last of them; the call stands where it would be written.
        covered: all of them, ``root`` too. What is not the root is read by no other node, unless
            ``write`` gives it a value.
        write: the root's value, or None: then the nodes are written as if there were no kernel.
            The last argument is what the nodes' names begin with where a composite is written in
            place.
    """

    root: str
    covered: frozenset[str]
    write: Callable[[Body, Node, str], Value | None]


class Kernels(Protocol):
    """A target's kernels."""

    def groups(self, program: Program, graph: Graph, taken: frozenset[str]) -> Iterable[Group]:
        """The groups of a body, no two with a node in common and none with one in ``taken``."""

    def missed(self, body: Body, node: Node) -> None:
        """This node is written for torch: no kernel computes it."""
