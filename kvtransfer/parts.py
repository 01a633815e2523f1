"""Reading parts of blocks: layers that are final, of blocks whose other layers are being computed.

A block is `KvLayout.num_parts` parts of equal bytes. Memory of such blocks is, at the same time,
memory of that many more blocks, each a part, and a transport that knows this reads one like the
other:

    block     |      0      |      1      | ...
    parts     |  0  1  2  3 |  4  5  6  7 | ...
"""

from collections.abc import Sequence

from kvtransfer.paths import Path
from pdserve.domain.ids import BlockId, HandoffId
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore


def part_ids(block_ids: Sequence[BlockId], parts: range, num_parts: int) -> list[BlockId]:
    """Those parts of each block, block by block."""
    return [BlockId(block * num_parts + part) for block in block_ids for part in parts]


class PartReader:
    """Reads parts of a peer's blocks to where they belong in the same number of own blocks."""

    def __init__(self, path: Path, memory: KvMemory) -> None:
        self.num_parts = memory.layout.num_parts
        self._path = path
        self._whole = memory
        self._memory = memory.divided(self.num_parts)

    @property
    def part_bytes(self) -> int:
        return self._memory.layout.block_bytes

    async def read(
        self, remote_blocks: Sequence[BlockId], local_blocks: Sequence[BlockId], parts: range
    ) -> bool:
        """As `Path.read_parts`; nothing is checked before `digests`."""
        remote = part_ids(remote_blocks, parts, self.num_parts)
        local = part_ids(local_blocks, parts, self.num_parts)
        return await self._path.read_parts(remote, self._memory, local, self.num_parts)

    async def digests(
        self, handoff: HandoffId, block_indices: Sequence[int], local_blocks: Sequence[BlockId]
    ) -> list[bytes]:
        """Of whole blocks, once all of their parts were read: to compare with the peer's."""
        return await self._whole.digests(handoff, block_indices, local_blocks)


def part_reader(path: Path, memory: KvStore) -> PartReader | None:
    """Of a peer whose blocks are as ours; None if ours have no parts, or are a device's."""
    if not isinstance(memory, KvMemory) or memory.layout.num_parts == 1:
        return None
    return PartReader(path, memory)
