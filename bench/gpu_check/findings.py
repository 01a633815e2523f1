"""What a part of the check found, as a line of JSON between its process and the runner."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A measurement, or, if `is_good` is said, something that must be so."""

    what: str
    value: float | str = ""
    unit: str = ""
    note: str = ""
    is_good: bool | None = None

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_line(cls, line: str) -> "Finding | None":
        """None for lines that libraries print."""
        try:
            data = json.loads(line)
            return cls(**data) if isinstance(data, dict) else None
        except (ValueError, TypeError):
            return None

    @property
    def value_text(self) -> str:
        if isinstance(self.value, str):
            return self.value
        digits = 0 if abs(self.value) >= 100 else 2 if abs(self.value) >= 1 else 4
        return f"{self.value:,.{digits}f}"


def must(what: str, is_good: bool, *, value: float | str = "", note: str = "") -> Finding:
    return Finding(what=what, value=value, note=note, is_good=is_good)
