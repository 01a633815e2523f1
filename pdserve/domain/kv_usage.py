"""Where every KV block of a worker is, at one moment."""

from dataclasses import dataclass

from pdserve.domain.invariants import check_invariant


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
        num_blocks = self.free + self.reserved + self.held + self.pinned
        check_invariant(num_blocks == self.total, "blocks add up to the total", self)
        check_invariant(0 <= self.cached <= self.free, "cached blocks are free", self)

    @property
    def is_idle(self) -> bool:
        """No request has any block."""
        return self.free == self.total
