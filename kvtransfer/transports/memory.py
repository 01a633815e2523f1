"""Reading the memory of another worker of the same process, block by block."""

import asyncio
from collections.abc import Callable, Sequence

from kvtransfer.transports.base import MayRead
from kvtransfer.transports.block_runs import check_read
from pdserve.domain.errors import TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_memory import KvMemory


class MemoryRegionServer:
    def __init__(self, region: RemoteRegion, forget: Callable[[], object]) -> None:
        self.region = region
        self._forget = forget

    async def close(self) -> None:
        self._forget()


class MemoryTransport:
    """One object serves all workers of the process; each block takes `block_s()`."""

    name = "memory"

    def __init__(self, block_s: Callable[[], float] = lambda: 0.0) -> None:
        self.block_s = block_s
        self._num_served = 0
        self._served: dict[str, tuple[KvMemory, MayRead]] = {}

    async def serve(self, memory: KvMemory, may_read: MayRead) -> MemoryRegionServer:
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
        memory: KvMemory,
        local_blocks: Sequence[BlockId],
    ) -> None:
        check_read(region, remote_blocks, memory, local_blocks)
        for remote, local in zip(remote_blocks, local_blocks, strict=True):
            await asyncio.sleep(self.block_s())
            if (served := self._served.get(region.address["place"])) is None:
                raise TransferFailed("the peer is gone")
            source, may_read = served
            if not may_read([remote]):
                raise TransferFailed("the peer refuses: the block is not on offer")
            memory.block(local)[:] = source.block(remote)

    async def close_peer(self, region: RemoteRegion) -> None: ...

    async def close(self) -> None: ...
