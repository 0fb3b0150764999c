"""``config.json`` of a checkpoint, which gives the dims."""

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
    path = checkpoint / "config.json"
    if not checkpoint.is_dir():
        raise UserError(f"there is no checkpoint folder {checkpoint}")
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object, found {type(config).__name__}")
    return config
