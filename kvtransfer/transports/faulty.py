"""A transport that damages what it reads, for fault drills and tests."""

from collections.abc import Sequence
from typing import Literal

from kvtransfer.transports.base import MayRead, OnRead, RegionServer, Transport, ignore
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_store import BlockRun, KvStore


class FaultyTransport:
    """`inner`, but one byte of each of the first `corrupt` blocks read is flipped ("all": of each).

    A worker puts it in when its setting `corrupt_kv_blocks` is not 0, to show that damage is
    found, counted and retried. Never in service: it can only make answers slower, not wrong, but
    it makes them slower.
    """

    def __init__(self, inner: Transport, corrupt: int | Literal["all"]) -> None:
        self.name = inner.name
        self.num_corrupted = 0
        self._inner = inner
        self.corrupt = corrupt

    async def register(self, memory: KvStore) -> None:
        await self._inner.register(memory)

    async def serve(
        self, memory: KvStore, may_read: MayRead, on_read: OnRead = ignore
    ) -> RegionServer:
        return await self._inner.serve(memory, may_read, on_read)

    def can_reach(self, region: RemoteRegion) -> bool:
        return self._inner.can_reach(region)

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        await self._inner.read(region, remote_blocks, memory, local_blocks)
        for block_id in local_blocks:
            if self.corrupt != "all" and self.num_corrupted >= self.corrupt:
                return
            block, run = bytearray(region.block_bytes), [BlockRun(0, block_id, 1)]
            await memory.copy_out(block, run)
            block[self.num_corrupted % len(block)] ^= 1
            await memory.copy_in(block, run)
            self.num_corrupted += 1

    async def close_peer(self, region: RemoteRegion) -> None:
        await self._inner.close_peer(region)

    async def close(self) -> None:
        await self._inner.close()
