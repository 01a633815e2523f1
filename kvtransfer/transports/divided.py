"""Regions whose blocks are counted in parts; see `kvtransfer.parts`."""

from dataclasses import dataclass

from pdserve.domain.messages import RemoteRegion


class ReadsParts:
    """A transport whose `read` also takes a `PartsRegion`, with memory that is divided alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsRegion(RemoteRegion):
    """A region whose blocks are the parts of the blocks of another."""

    num_parts: int

    @classmethod
    def of(cls, region: RemoteRegion, num_parts: int) -> "PartsRegion":
        return cls(
            transport=region.transport,
            address=region.address,
            num_blocks=region.num_blocks * num_parts,
            block_bytes=region.block_bytes // num_parts,
            rank=region.rank,
            num_parts=num_parts,
        )


def num_parts_of(region: RemoteRegion) -> int:
    """Into how many parts each block is divided that `region` counts; 1 if it counts blocks."""
    return region.num_parts if isinstance(region, PartsRegion) else 1
