"""Reading the memory of another worker of the same process, block by block."""

import asyncio
from collections.abc import Callable, Sequence

from kvtransfer.transports.base import MayRead, OnRead, check_read, ignore
from kvtransfer.transports.divided import ReadsParts, num_parts_of
from pdserve.domain.errors import ReadRefused, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import BlockRun, KvStore, bytes_of


class MemoryRegionServer:
    sees_reads = False

    def __init__(self, region: RemoteRegion, forget: Callable[[], object]) -> None:
        self.region = region
        self._forget = forget

    async def close(self) -> None:
        self._forget()


class MemoryTransport(ReadsParts):
    """One object serves all workers of the process; each block takes `block_s()`.

    It asks `may_read` of each block, but tells nobody of reads.
    """

    name = "memory"

    def __init__(self, block_s: Callable[[], float] = lambda: 0.0) -> None:
        self.block_s = block_s
        self._num_served = 0
        self._served: dict[str, tuple[KvStore, MayRead]] = {}

    async def register(self, memory: KvStore) -> None: ...

    async def serve(
        self, memory: KvStore, may_read: MayRead, on_read: OnRead = ignore
    ) -> MemoryRegionServer:
        self._num_served += 1
        place = str(self._num_served)
        self._served[place] = (memory, may_read)
        region = RemoteRegion(
            transport=self.name,
            address={"place": place},
            num_blocks=memory.num_blocks,
            block_bytes=memory.layout.block_bytes,
        )
        return MemoryRegionServer(region, lambda: self._served.pop(place, None))

    def can_reach(self, region: RemoteRegion) -> bool:
        return region.transport == self.name

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        check_read(region, remote_blocks, memory, local_blocks)
        num_parts = num_parts_of(region)
        for remote, local in zip(remote_blocks, local_blocks, strict=True):
            await asyncio.sleep(self.block_s() / num_parts)
            if (served := self._served.get(region.address["place"])) is None:
                raise TransferFailed("the peer is gone")
            source, may_read = served
            if not await may_read([BlockId(remote // num_parts)]):
                raise ReadRefused("the peer refuses: the block is not on offer")
            if num_parts > 1 and isinstance(source, KvMemory):
                source = source.divided(num_parts)
            [content] = await bytes_of(source, [remote])
            await memory.copy_in(content, [BlockRun(0, local, 1)])

    async def close_peer(self, region: RemoteRegion) -> None: ...

    async def close(self) -> None: ...
