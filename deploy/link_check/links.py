"""What was found of one link, and its verdict: from a prefill worker to a decode worker."""

from dataclasses import dataclass

from pdserve.domain.layout import ShardedLayout

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One end of a link."""

    name: str
    protocol_version: int
    layout: ShardedLayout | None  # None: the worker's version is older

    @property
    def shape(self) -> str:
        """In words."""
        if self.layout is None:
            return "not described"
        whole = self.layout.whole
        return (
            f"tp {self.layout.tp} pp {self.layout.pp}, {whole.block_size} tokens a block, "
            f"{whole.order} first, {whole.dtype}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One pair of workers, or of pools whose pairs are all alike."""

    prefill: Side
    decode: Side
    num_pairs: int = 1
    transport: str = ""
    why: str = ""  # that transport
    num_bytes: int = 0  # that were moved to measure the rate
    bytes_per_s: float | None = None
    latency_s: float | None = None  # of one block
    failure: str = ""  # empty: KV arrived as it was sent

    def verdict(self, min_bytes_per_s: float) -> str:
        """Why the link is not good enough; empty if it is."""
        if self.failure:
            return self.failure
        if self.bytes_per_s is not None and self.bytes_per_s < min_bytes_per_s:
            wanted = f"--min-gib-per-s {min_bytes_per_s / GIB:g}"
            return f"{self.bytes_per_s / GIB:.3g} GiB/s is less than {wanted}"
        return ""
