"""``config.json`` for a program's constants, from which ``--checkpoint`` reads them back.

Of a constant that ``config a, b, s.c`` binds to several keys, the first of each section is written
(``a`` and ``s.c``): sections are generations of the format, and readers of each look into theirs.
``require config`` says the rest: what a reader must know to take the checkpoint for what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compiler.coding import Coding
from compiler.errors import UserError
from compiler.ir import Program
from compiler.precision import Stored, weights_of
from compiler.tensors import patterns
from compiler.used import used
from dsl import syntax as ast
from dsl.config_keys import config_value
from dsl.constants import Choices, Constant, Constants, shown
from dsl.deploy.typed import Deployment, PrecisionRule
from dsl.diagnostics import DiagnosticError, Diagnostics
from dsl.instances import Instances
from dsl.program import CheckedProgram

# Keys of the format that hold a list where ``require`` names an item of it. Of the others, those
# with an item per layer, readers know what is meant where they are missing.
LISTS = {"architectures"}
PER_LAYER = {"layer_types"}

Config = dict[str, Any]


def config_of(source: CheckedProgram) -> Config:
    """The config.json that gives every constant the value it has.

    It names what the model reads, null included, as readers have defaults of their own; of the
    rest, what would otherwise be read as something else.

    Raises:
        UserError: no config.json does.
    """
    declared = source.constants.declared
    values = Instances(source.checker, source.constants).values
    bound = {name: v for name, v in values.items() if declared[name].keys}
    needed = used(source)
    config: Config = {}
    for name in bound.keys() & needed:
        _put(config, declared[name].keys, bound[name])
    for need, _ in source.library.declarations(ast.Require):
        if isinstance(need, ast.Require) and need.allowed:
            _put_required(config, need)
    for name in _differing(source, bound, config):
        if not _says(config, declared[name].keys):  # what is required goes before what is not read
            _put(config, declared[name].keys, bound[name])
    read = {name: bound[name] for name in bound.keys() & needed}
    for name, back in _differing(source, read, config).items():
        raise UserError(
            f"no config.json says that '{name}' is {shown(bound[name])}: "
            f"from {' or '.join(declared[name].keys)} it would be read as {shown(back)}"
        )
    return config


def unbound(source: CheckedProgram) -> dict[str, Constant]:
    """Constants that config.json does not carry, as no key is theirs, and that have been chosen
    otherwise than they are declared."""
    values = Instances(source.checker, source.constants).values
    free = {name: v for name, v in values.items() if not source.constants.declared[name].keys}
    different = _differing(source, free, config_of(source))
    return {name: values[name] for name in different}


def fp8_weights(deployment: Deployment, program: Program) -> tuple[tuple[int, int], set[Stored]]:
    """The tile that a deployment keeps weights in FP8 by, and which weights.

    Args:
        program: as elaborated.

    Raises:
        UserError: it keeps none so, or not as such checkpoints are published.
    """
    chosen: set[Stored] = set()
    tiles: set[tuple[int, int]] = set()
    for rule in deployment.precision:
        value = next((t for t in (*rule.targets, *rule.exceptions) if t.kind == "value"), None)
        if value is not None:
            raise UserError(
                f"the deployment '{deployment.name}' speaks of the value '{value}', and init of "
                "weights only: name parameters, uses or blocks"
            )
        tile = _fp8_tile(rule)
        if tile is None:
            chosen -= weights_of(program, rule)  # the last rule decides
        else:
            chosen |= weights_of(program, rule)
            tiles.add(tile)
    if not chosen:
        raise UserError(
            f"the deployment '{deployment.name}' keeps no weights in E4M3 with a scale in FP32 for "
            "each tile, which is how FP8 checkpoints are published"
        )
    if len(tiles) > 1:
        raise UserError(
            f"the deployment '{deployment.name}' has tiles of several sizes, and a checkpoint one"
        )
    return tiles.pop(), chosen


def _fp8_tile(rule: PrecisionRule) -> tuple[int, int] | None:
    weights = rule.roles.get("weights")
    if weights is None or weights.format is None or weights.tile is None:
        return None
    format, rows, columns = weights.format, weights.tile.rows, weights.tile.columns
    if format.scale is None or not rows or not columns:
        return None
    e4m3 = (format.exponent, format.fraction, format.infinities) == (4, 3, False)
    f32 = (format.scale.exponent, format.scale.fraction) == (8, 23)
    return (rows, columns) if e4m3 and f32 else None


def fp8_config(tile: tuple[int, int]) -> Config:
    """``quantization_config`` of a checkpoint whose matrices are in FP8."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(tile),
    }


def codings(program: Program) -> dict[str, Coding]:
    """Which tensors a program keeps as codes, by their names in a checkpoint, and how.

    Args:
        program: as `select-fp8` left it.

    Raises:
        UserError: none, or not as such checkpoints are published.
    """
    found = {tensor.name: p.coding for p in patterns(program) if p.coding for tensor in p.tensors()}
    deployment = program.deployment.name if program.deployment else ""
    kept = set(found.values())
    published = [
        c
        for c in kept
        if (c.format.exponent, c.format.fraction, c.format.infinities) == (4, 3, False)
        and c.format.scale is not None
        and c.rows
        and c.columns
    ]
    if not kept or len(published) < len(kept):
        raise UserError(
            f"the deployment '{deployment}' keeps no weights in E4M3 with a scale for each tile, "
            "which is how FP8 checkpoints are published"
        )
    if len(kept) > 1:
        raise UserError(
            f"the deployment '{deployment}' has tiles of several sizes, and a checkpoint one"
        )
    return found


def coding_config(coding: Coding) -> Config:
    """``quantization_config`` for weights in this format and tile."""
    assert coding.rows and coding.columns and coding.format.scale
    config = fp8_config((coding.rows, coding.columns))
    scale = coding.format.scale
    return config if scale.fraction else config | {"scale_fmt": scale.name}


def shipped_for(config: Config) -> str:
    """The shipped model whose equations are those of a checkpoint.

    Raises:
        UserError: there is none, or there are several.
    """
    from dsl.files import shipped_models
    from dsl.program import open_program

    found = []
    for name in shipped_models():
        try:
            source = open_program(name, Choices(config=config))
        except DiagnosticError:
            continue
        if source.model is not None:
            found.append(name)
    if len(found) != 1:
        what = ", ".join(found) if found else "none"
        raise UserError(
            f"shipped models that fit the checkpoint: {what}; --file names an .arch file"
        )
    return found[0]


def _put_required(config: Config, need: ast.Require) -> None:
    value = need.allowed[0].value
    if value is None or _says(config, need.keys) or PER_LAYER & set(need.keys):
        return
    for key in need.keys:
        _put(config, (key,), [value] if key in LISTS else value)


def _says(config: Config, keys: Iterable[str]) -> bool:
    return any(config_value(config, key) is not None for key in keys)


def _put(config: Config, keys: Iterable[str], value: object) -> None:
    """Under the first key of each section."""
    for key in _one_of_each_section(keys):
        *sections, last = key.split(".")
        inner = config
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise UserError(f"config.json cannot have both a value {section} and {key}")
        inner[last] = value


def _one_of_each_section(keys: Iterable[str]) -> list[str]:
    first: dict[str, str] = {}
    for key in keys:
        first.setdefault(key.rpartition(".")[0], key)
    return list(first.values())


def _differing(
    source: CheckedProgram, wanted: Mapping[str, Constant], config: Config
) -> dict[str, Constant]:
    """Constants that would be read from a config.json with another value than wanted, and that."""
    old = source.constants
    choices = Choices(config=config)
    read = Constants(old.declared, old.functions, old.presets, choices, Diagnostics())
    values = Instances(source.checker, read).values
    found = {name: values.get(name) for name in wanted}
    return {name: back for name, back in found.items() if not _same(wanted[name], back)}


def _same(a: Constant, b: Constant) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)
