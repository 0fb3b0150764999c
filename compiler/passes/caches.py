"""A cache is written once in a step.

What a block keeps from token to token belongs to the place where it is used. A block that is run
twice in one step (``layer(layer(x))``, a shared layer) would write the same positions twice, and
the next step would read the second writing for both. It is part of ``elaborate``.
"""

from __future__ import annotations

from compiler.ir import KEPT, Node, Program
from dsl.diagnostics import Diagnostic, DiagnosticError, Note, Span

Path = tuple[str, ...]


def check(program: Program) -> None:
    """See the module.

    Raises:
        DiagnosticError: an entry point runs a block that caches twice.
    """
    for entry in program.entries.values():
        _visit(program, entry.name, entry.body, (), None, {})


def _visit(
    program: Program,
    entry: str,
    body: str,
    path: Path,
    call: Node | None,
    written: dict[tuple[Path, str], Span | None],
) -> None:
    for node in program.bodies[body]:
        if node.op in KEPT:
            key = (path, str(node.attrs["name"]))
            if key in written:
                raise _twice(node, entry, path, call, written[key])
            written[key] = call.span if call is not None else node.span
        elif node.op in ("call", "chain", "apply"):
            index = node.attrs.get("index")
            child = node.attrs["child"] + (f"[{index.name}]" if index is not None else "")
            inner = (*path, child) if child else path
            _visit(program, entry, node.attrs["body"], inner, node, written)


def _twice(
    cache: Node, entry: str, path: Path, call: Node | None, first: Span | None
) -> DiagnosticError:
    name, keeps = cache.attrs["name"], "caches" if cache.op == "cache" else "keeps"
    notes = (
        [Note(cache.span, "cached here" if keeps == "caches" else "kept here")]
        if cache.span is not None
        else []
    )
    if first is not None:
        notes.insert(0, Note(first, "it runs here first"))
    return DiagnosticError(
        [
            Diagnostic(
                "E0506",
                f"'{'.'.join(path)}' runs twice in one step of '{entry}', and {keeps} '{name}' "
                "each time",
                call.span if call is not None else cache.span,
                notes=tuple(notes),
                hint=f"what is {'cached' if keeps == 'caches' else 'kept'} belongs to one use: "
                "use the block once for each time it runs",
            )
        ]
    )
