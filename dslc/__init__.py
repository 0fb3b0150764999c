"""dslc: model architectures written as equations, compiled.

    import dslc

    program = dslc.compile("models/dsv3.arch", dims="small")
    program.save("build/small")
    model = dslc.load("build/small")
    logits = model(tokens)

Importing this imports neither torch nor networkx: what a call needs is imported when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import UserError
from dsl.diagnostics import DiagnosticError

if TYPE_CHECKING:
    import torch

    from backends.pytorch.model import Model
    from compiler.planning.plan import Plan
    from dslc.program import Program

__version__ = "0.1.0"
__all__ = ["DiagnosticError", "UserError", "__version__", "compile", "load", "plan"]


def compile(
    file: str | Path,
    dims: str | None = None,
    set: Mapping[str, int | float | bool | str | None] | None = None,
    checkpoint: str | Path | None = None,
    deploy: str | None = None,
    backend: str = "pytorch",
    target: str = "cpu",
    model: str | None = None,
) -> Program:
    """Compile an ``.arch`` file.

    Args:
        file: a path, or the name of a shipped model (``dsv3``).
        dims: a preset of the file; its default preset unless given.
        set: values of constants, by their names or their keys in ``config.json``.
        checkpoint: a Hugging Face checkpoint folder, whose ``config.json`` gives the dims.
        deploy: a deployment of the file; what it asks for and no pass acts on yet is refused when
            the program is saved.
        model: one of several models of the file.

    Raises:
        DiagnosticError: the file has mistakes; its text tells all of them, with their places.
        UserError: anything else that the caller can mend.
    """
    from dslc.program import compile_file

    return compile_file(
        str(file),
        dims,
        set,
        Path(checkpoint) if checkpoint else None,
        deploy,
        backend,
        target,
        model,
    )


def plan(
    file: str | Path,
    deploy: str,
    dims: str | None = None,
    set: Mapping[str, int | float | bool | str | None] | None = None,
    checkpoint: str | Path | None = None,
    costs: str | Path | None = None,
    model: str | None = None,
) -> Plan:
    """What a deployment would cost and how fast it would run; runs nothing and needs no torch.

    Args:
        file, dims, set, checkpoint, model: as ``compile`` has them.
        deploy: a deployment of the file with a cluster and a load (``pretrain``).
        costs: a JSON file with measured seconds of a layer, in place of modelled ones.

    Returns:
        ``as_data()`` is what ``dslc plan --json`` prints; ``seconds``, ``tokens`` per second,
        ``memory`` (bytes), ``fits``, ``problems``, ``assumptions``.

    Raises:
        DiagnosticError: the file has mistakes, or the deployment does not hold at these sizes.
        UserError: no load or no cluster, a cluster that lacks figures, measured durations that are
            none.
    """
    from compiler.pipeline import STAGES
    from compiler.planning.costs import read_costs
    from compiler.planning.plan import make
    from dslc.program import compile_file

    measured = None if costs is None else read_costs(Path(costs))
    where = Path(checkpoint) if checkpoint else None
    program = compile_file(str(file), dims, set, where, None, "pytorch", "cpu", model)
    return make(program.after(STAGES[0]), program.after(), program.deployment(deploy), measured)


def load(
    directory: str | Path,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """Load a compiled directory as a ``torch.nn.Module``: ``backends.pytorch.load.load``.

    Without a checkpoint, weights are random, as functions of ``seed`` and their names.
    """
    from backends.pytorch.load import load

    return load(directory, checkpoint, device, dtype, seed, **options)
