"""Small JSON files beside the weights."""

import json
from pathlib import Path
from typing import Any

from lragent_jax.models.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `CheckpointError` if it is absent, no JSON, or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path.name} in {path.parent}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
