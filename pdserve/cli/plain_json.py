"""JSON that every reader takes: a number that JSON lacks is null."""

import json
import math
from collections.abc import Mapping


def json_text(content: object, *, indent: int | None = None) -> str:
    """`content` (mappings, sequences, text and numbers) as JSON; NaN and infinity as null."""
    return json.dumps(plain(content), indent=indent, allow_nan=False)


def plain(value: object) -> object:
    """`value` with None for each number that is not finite."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _:
            return value
