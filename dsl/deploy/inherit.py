"""What a deployment says, with what it inherits: one set of clauses, nothing of it checked yet.

``deploy b from a`` starts from the clauses of a. A shard rule replaces the one for its target,
a setting of ``train`` or ``serve`` replaces the setting; any other clause replaces a's clause.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dsl import syntax as ast
from dsl.deploy import syntax as written
from dsl.diagnostics import Diagnostics, near
from dsl.files import Unit
from dsl.tables import MOST_BASES, key_of, report_circle, report_depth, spelled

Home = tuple[written.Deploy, Unit]
Homes = Mapping[str, Sequence[Home]]  # by name; several models may have one of a name
C = TypeVar("C", bound=written.Clause)


@dataclass
class Clauses:
    """The clauses of one deployment. ``options`` are the settings of ``load``."""

    deploy: written.Deploy
    bases: tuple[str, ...]
    model: ast.Block
    home: Unit
    cluster: ast.Name | None
    mesh: written.Mesh | None
    stages: written.Stages | None
    overlap: written.Overlap | None
    recompute: written.Recompute | None
    load: written.Train | written.Serve | None
    options: list[written.Figure] = field(default_factory=list)
    shard: list[written.ShardRule] = field(default_factory=list)
    precision: list[written.Precision] = field(default_factory=list)


def inherited(
    deploy: written.Deploy, unit: Unit, homes: Homes, broken: set[str], found: Diagnostics
) -> Clauses | None:
    """The clauses of ``deploy``, one of ``homes``; None after a diagnostic."""
    chain = _chain(deploy, unit, homes, broken, found)
    model = _model(deploy, chain, found) if chain else None
    if model is None:
        return None
    _check_once(deploy, found)
    clauses = Clauses(
        deploy,
        tuple(d.name.text for d, _ in chain[1:]),
        *model,
        next((d.cluster for d, _ in chain if d.cluster is not None), None),
        _nearest(chain, written.Mesh),
        _nearest(chain, written.Stages),
        _nearest(chain, written.Overlap),
        _nearest(chain, written.Recompute),
        next((c for d, _ in chain for c in d.clauses if is_load(c)), None),  # type: ignore[arg-type]
    )
    _options(clauses, chain, found)
    _rules(clauses, chain, found)
    precision = next((p for d, _ in chain if (p := list(_own(d, written.Precision)))), [])
    none = [len(precision) == 1 and p.label.text == "none" and not p.roles for p in precision]
    clauses.precision = [] if any(none) else precision
    return clauses


def is_load(clause: written.Clause) -> bool:
    return isinstance(clause, (written.Train, written.Serve))


def _own(deploy: written.Deploy, kind: type[C]) -> Iterator[C]:
    return (c for c in deploy.clauses if isinstance(c, kind))


def _nearest(chain: list[Home], kind: type[C]) -> C | None:
    return next((c for d, _ in chain for c in _own(d, kind)), None)


def _chain(
    deploy: written.Deploy, unit: Unit, homes: Homes, broken: set[str], found: Diagnostics
) -> list[Home]:
    """The deployment and its bases, nearest first; nothing after a diagnostic."""
    chain: list[Home] = [(deploy, unit)]
    while (base := chain[-1][0].base) is not None:
        named = homes.get(base.text, ())
        named = [h for h in named if h[0] is not chain[-1][0]] or named
        beside = [h for h in named if h[1] is chain[-1][1]]
        if not named:
            if not {base.text, "*"} & broken:
                found.error(
                    "E0806",
                    f"no deployment is called '{base.text}'",
                    base.span,
                    hint=near(base.text, homes),
                )
            return []
        following = (beside or named)[-1]
        members = [d for d, _ in chain]
        if following[0] in members:
            report_circle("deployment", members[members.index(following[0]) :], found)
            return []
        if len(chain) > MOST_BASES:
            report_depth("deployment", deploy, found)
            return []
        chain.append(following)
    return chain


def _model(
    deploy: written.Deploy, chain: list[Home], found: Diagnostics
) -> tuple[ast.Block, Unit] | None:
    named = next(((d.model, u) for d, u in chain if d.model is not None), None)
    if named is None:
        found.error(
            "E0804",
            f"deployment '{deploy.name.text}' does not say which model it is of",
            deploy.name.span,
            hint=f"deploy {deploy.name.text} of Model, or from another deployment",
        )
        return None
    name, unit = named
    visible = unit.visible.get(name.text)
    if visible is not None and isinstance(visible[0], ast.Block) and visible[0].is_model:
        return visible[0], visible[1]
    if not {name.text, "*"} & unit.broken:
        models = [
            n for n, (d, _) in unit.visible.items() if isinstance(d, ast.Block) and d.is_model
        ]
        found.error(
            "E0806",
            f"no model is called '{name.text}'",
            name.span,
            hint=near(name.text, models) or "is an import missing?",
        )
    return None


def _check_once(deploy: written.Deploy, found: Diagnostics) -> None:
    """Each kind of clause once, but shard and precision."""
    first: dict[type, written.Clause] = {}
    for clause in deploy.clauses:
        kind = written.Train if is_load(clause) else type(clause)
        before = first.setdefault(kind, clause)
        if before is clause or kind in (written.Shard, written.Precision):
            continue
        if type(before) is type(clause):
            code, message = "E0809", f"'{type(clause).__name__.lower()}' is given twice"
        else:
            code, message = "E0821", "a deployment trains or serves, not both"
        found.error(code, message, clause.span, notes=[(before.span, "first given here")])


def _options(clauses: Clauses, chain: list[Home], found: Diagnostics) -> None:
    """The settings of the load, over those of the same load in the bases."""
    load = clauses.load
    options: dict[str, written.Figure] = {}
    for deploy, _ in reversed(chain):
        for clause in deploy.clauses:
            if not isinstance(clause, (written.Train, written.Serve)):
                continue
            if _kind(clause) == _kind(load):
                own: dict[str, written.Figure] = {}
                for option in clause.options:
                    _claim(own, spelled(key_of(option)), option, "given", found)
                options |= own
    clauses.options = list(options.values())


def _kind(load: written.Train | written.Serve | None) -> str:
    return load.phase.text if isinstance(load, written.Serve) else type(load).__name__


def _rules(clauses: Clauses, chain: list[Home], found: Diagnostics) -> None:
    rules: dict[str, written.ShardRule] = {}
    for deploy, _ in reversed(chain):
        own: dict[str, written.ShardRule] = {}
        for rule in (r for c in _own(deploy, written.Shard) for r in c.rules):
            _claim(own, str(rule.place), rule, "placed", found)
        rules |= own
    clauses.shard = list(rules.values())


F = TypeVar("F", written.Figure, written.ShardRule)


def _claim(own: dict[str, F], name: str, one: F, done: str, found: Diagnostics) -> None:
    if name in own:
        found.error(
            "E0809",
            f"'{name}' is {done} twice",
            one.span,
            notes=[(own[name].span, f"first {done} here")],
        )
    own[name] = one
