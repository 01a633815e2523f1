"""Where every KV block of a worker is, at one moment."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KvUsage:
    """`free + reserved + held + pinned == total`, always; `cached` counts part of `free`."""

    free: int
    reserved: int
    held: int
    pinned: int
    total: int
    cached: int = 0

    def __post_init__(self) -> None:
        assert self.free + self.reserved + self.held + self.pinned == self.total, self
        assert 0 <= self.cached <= self.free, self

    @property
    def is_idle(self) -> bool:
        """No request has any block."""
        return self.free == self.total
