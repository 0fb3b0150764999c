"""What of a deployment this compiler does not act on yet.

Passes read ``program.deployment`` and change nothing without it, or where it asks nothing of them.
What no pass acts on is refused where a program would be emitted, because it would run otherwise
than the deployment says; every stage can still be looked at. A pass that learns to act on a part
takes its row away here.
"""

from __future__ import annotations

from collections.abc import Callable

from compiler.errors import UserError
from compiler.precision import CONTRACTIONS
from dsl.deploy.typed import Deployment
from dsl.diagnostics import Span

Found = tuple[str, Span | None]  # what it asks for, and where


def _stages(deployment: Deployment) -> Found | None:
    return ("pipeline stages", deployment.stages.span) if deployment.stages else None


def _precision(deployment: Deployment) -> Found | None:
    """Rules for contractions are `select-fp8`'s."""
    rule = next((r for r in deployment.precision if r.selects not in CONTRACTIONS), None)
    return None if rule is None else (f"precision '{rule.label}' for {rule.selects}", rule.span)


def _overlap(deployment: Deployment) -> Found | None:
    schedule = deployment.overlap.schedule
    if schedule in ("none", "two_microbatches"):
        return None
    return f"the schedule '{schedule}'", deployment.overlap.span


def _train(deployment: Deployment) -> Found | None:
    return ("training", deployment.train.span) if deployment.train else None


# One row for each part, in the order in which they are told.
NOT_ACTED_ON: tuple[Callable[[Deployment], Found | None], ...] = (
    _stages,
    _precision,
    _overlap,
    _train,
)


def refuse_what_is_not_acted_on(deployment: Deployment | None) -> None:
    """To be called before a program is emitted.

    Raises:
        UserError: the deployment asks for what no pass does yet; one sentence names all of it.
    """
    if deployment is None:
        return
    found = [told for part in NOT_ACTED_ON if (told := part(deployment)) is not None]
    if found:
        listed = ", ".join(f"{what} ({span})" if span else what for what, span in found)
        raise UserError(
            f"the deployment '{deployment.name}' asks for what is not built yet: {listed}; "
            "with --emit graph the stages up to there can be looked at"
        )
