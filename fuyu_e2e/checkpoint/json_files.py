"""JSON files of models and checkpoints. Imports no torch, so that checksums can be compared without it."""

import json
from pathlib import Path
from typing import Any

from fuyu_e2e.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        UserError: There is no file, or it contains something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): fetch it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} instead of an object: fetch it again.")
    return value
