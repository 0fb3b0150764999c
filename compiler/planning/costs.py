"""Measured durations in place of modelled ones: ``dslc plan --costs FILE``.

The file gives seconds for one layer that dispatches tokens, by phase::

    {"attention": {"forward": 1e-3, "backward": 1.5e-3, "weight": 0.5e-3},
     "mlp":       {"forward": ..., "backward": ..., "weight": ...},
     "dispatch":  {"forward": ..., "backward": ...},
     "combine":   {"forward": ..., "backward": ...}}

"backward" is the part for the inputs alone. Whatever is left out keeps its modelled time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from compiler.errors import UserError
from dsl.diagnostics import near

PHASES = {"forward": "forward", "backward": "inputs", "weight": "weight"}
GROUPS = {
    "attention": ("forward", "backward", "weight"),
    "mlp": ("forward", "backward", "weight"),
    "dispatch": ("forward", "backward"),
    "combine": ("forward", "backward"),
}


@dataclass(frozen=True)
class Measured:
    """Seconds by group (attention, mlp, dispatch, combine) and phase (forward, inputs, weight)."""

    seconds: Mapping[str, Mapping[str, float]]
    source: str


def read_costs(path: Path) -> Measured:
    """A file of measured durations.

    Raises:
        UserError: it cannot be read, or says something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict) or not data:
        raise UserError(f"{path} must hold an object with {', '.join(GROUPS)}")
    seconds: dict[str, dict[str, float]] = {}
    for group, phases in data.items():
        if group not in GROUPS:
            hint = near(group, GROUPS) or f"there are {', '.join(GROUPS)}"
            raise UserError(f"{path}: '{group}' is no part of a layer; {hint}")
        if not isinstance(phases, dict):
            raise UserError(f"{path}: '{group}' must hold {', '.join(GROUPS[group])}, in seconds")
        for phase, value in phases.items():
            if phase not in GROUPS[group]:
                known = ", ".join(GROUPS[group])
                raise UserError(f"{path}: '{group}' has no phase '{phase}'; it has {known}")
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not isfinite(value)
                or value < 0
            ):
                raise UserError(
                    f"{path}: {group}.{phase} must be seconds, 0 or more, not {json.dumps(value)}"
                )
            seconds.setdefault(group, {})[PHASES[phase]] = float(value)
    return Measured(seconds, str(path))
