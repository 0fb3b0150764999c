"""Dotted keys of a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; null, and a path through what is no section, count as absent."""
    at: Any = config
    for part in key.split("."):
        if not isinstance(at, Mapping):
            return None
        at = at.get(part)
    return at


def not_a_section(config: Mapping[str, Any], key: str) -> str | None:
    """The part of a dotted key whose value is there, but has no keys of its own."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        section = ".".join(parts[:count])
        value = config_value(config, section)
        if value is not None and not isinstance(value, Mapping):
            return section
    return None
