"""JSON files of a model directory."""

import json
from pathlib import Path
from typing import Any

from pdserve.domain.errors import LocalFault


def read_json(path: Path) -> dict[str, Any]:
    """The object that the file holds; `LocalFault` says what is wrong with it."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise LocalFault(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise LocalFault(f"{path} is not valid JSON") from error
    if not isinstance(content, dict):
        raise LocalFault(f"{path} must hold a JSON object")
    return content


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; an empty object if there is no such file."""
    return read_json(path) if path.exists() else {}
