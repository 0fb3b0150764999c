"""``config.json`` of a checkpoint, which gives the dims, and other objects in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compiler.errors import UserError


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The configuration of a checkpoint folder.

    Raises:
        UserError: there is no such folder or file, or it is not a JSON object.
    """
    if not checkpoint.is_dir():
        raise UserError(f"there is no checkpoint folder {checkpoint}")
    return read_object(checkpoint / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object, found {type(found).__name__}")
    return found
