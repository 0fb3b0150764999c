"""What the emitter asks of a target that has kernels of its own: which nodes one call computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from backends.pytorch.emit.values import Value
from compiler.ir import KEPT, Graph, Node, Program

if TYPE_CHECKING:
    from backends.pytorch.emit.body import Body


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
        reads: whose values it asks for; None: those of all operands. What only groups use, and
            none reads, is not written either.
    """

    root: str
    covered: frozenset[str]
    write: Callable[[Body, Node, str], Value | None]
    reads: frozenset[str] | None = None


class Kernels(Protocol):
    """A target's kernels."""

    def groups(
        self, program: Program, graph: Graph, taken: frozenset[str], inline: bool
    ) -> Iterable[Group]:
        """The groups of a body, no two with a node in common and none with one in ``taken``.

        Args:
            inline: the body is written in place of a composite.
        """

    def missed(self, body: Body, node: Node) -> None:
        """This node is written for torch: no kernel computes it."""


def unread(graph: Graph, groups: Iterable[Group]) -> set[str]:
    """The nodes outside of groups that only groups use, and none of them reads: views mostly."""
    covered: set[str] = set()
    reads: set[str] = set()
    for group in groups:
        covered |= group.covered
        operands = {i for name in group.covered for i in graph[name].inputs}
        reads |= operands if group.reads is None else group.reads
    found: set[str] = set()
    kept = reads | covered | {graph.output}
    for node in reversed(list(graph)):
        if node.name in kept or node.op in KEPT or node.op == "input":
            continue
        users = {user.name for user in graph.users(node.name)}
        if users and users <= covered | found:
            found.add(node.name)
    return found
