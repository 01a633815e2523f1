"""Small KV memories, and a transport between them without a system underneath."""

import types
from collections.abc import Container, Generator, Iterator, Sequence
from contextlib import contextmanager
from random import Random

from kvtransfer.reading import BlockReader, RankReaders
from kvtransfer.transports.base import MayRead, OnRead, Transport, check_read, ignore
from pdserve.domain.errors import TransferFailed
from pdserve.domain.ids import BlockId, HandoffId, RequestId
from pdserve.domain.layout import KvLayout, LayerKv, ShardedLayout
from pdserve.domain.messages import RemoteRegion, StartHandoff
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore

BLOCK_SIZE = 4


def layout_of(block_bytes: int) -> KvLayout:
    """One layer of bytes, `BLOCK_SIZE` tokens a block."""
    assert block_bytes % (2 * BLOCK_SIZE) == 0, block_bytes
    head_dim = block_bytes // (2 * BLOCK_SIZE)
    layer = LayerKv(num_kv_heads=1, k_head_dim=head_dim, v_head_dim=head_dim)
    return KvLayout(layers=(layer,), block_size=BLOCK_SIZE, dtype="uint8", item_bytes=1)


@contextmanager
def kv_memory(
    num_blocks: int, block_bytes: int = 64, seed: int | None = None
) -> Iterator[KvMemory]:
    """Zeroed, or filled with what `seed` says; closed at the end."""
    memory = KvMemory(layout_of(block_bytes), num_blocks)
    if seed is not None:
        memory.bytes[:] = Random(seed).randbytes(memory.num_bytes)
    try:
        yield memory
    finally:
        memory.close()


def reader_of(transport: Transport, region: RemoteRegion, memory: KvStore) -> BlockReader:
    """From a worker of one rank to another."""
    layout = ShardedLayout(whole=memory.layout)
    readers = RankReaders(memory, layout=layout, rank=0, transports=[transport])
    reader = readers.open(layout, [region])
    assert reader is not None
    return reader


async def anyone(block_ids: Sequence[BlockId]) -> bool:
    """For those who let every block be read."""
    return True


def only(allowed: Container[int]) -> MayRead:
    """For those who let some blocks be read."""

    async def may_read(block_ids: Sequence[BlockId]) -> bool:
        return all(block in allowed for block in block_ids)

    return may_read


def blocks(*ids: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(block) for block in ids)


def handoff_id(request: str = "r", attempt: int = 1, retry: int = 0) -> HandoffId:
    return HandoffId(RequestId(request), attempt, retry)


def start_of(
    num_tokens: int, first_block: int = 0, handoff: HandoffId | None = None
) -> StartHandoff:
    return StartHandoff(
        handoff=handoff or handoff_id(),
        prompt_token_ids=tuple(range(num_tokens)),
        first_block=first_block,
        sampling=SamplingParams(max_tokens=1),
        deadline_s=10.0,
    )


@types.coroutine
def pause() -> Generator[None, None, None]:
    """Give way once, whoever drives the coroutine."""
    yield


class DirectServer:
    sees_reads = True

    def __init__(self, region: RemoteRegion) -> None:
        self.region = region

    async def close(self) -> None: ...


class DirectTransport:
    """Reads within one process, block by block, giving way after each if `is_slow`."""

    name = "direct"

    def __init__(self, *, is_slow: bool = False) -> None:
        self.is_slow = is_slow
        self.num_reads = 0
        self._served: list[tuple[KvMemory, MayRead]] = []

    async def register(self, memory: KvStore) -> None: ...

    async def serve(
        self, memory: KvStore, may_read: MayRead, on_read: OnRead = ignore
    ) -> DirectServer:
        assert isinstance(memory, KvMemory)
        return DirectServer(self.add(memory, may_read))

    def add(self, memory: KvMemory, may_read: MayRead) -> RemoteRegion:
        self._served.append((memory, may_read))
        return RemoteRegion(
            transport=self.name,
            address={"place": str(len(self._served) - 1)},
            num_blocks=memory.num_blocks,
            block_bytes=memory.layout.block_bytes,
        )

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
        assert isinstance(memory, KvMemory)
        source, may_read = self._served[int(region.address["place"])]
        self.num_reads += 1
        if not await may_read(remote_blocks):
            raise TransferFailed("not on offer")
        for remote, local in zip(remote_blocks, local_blocks, strict=True):
            memory.block(local)[:] = source.block(remote)
            if self.is_slow:
                await pause()

    async def close_peer(self, region: RemoteRegion) -> None: ...

    async def close(self) -> None: ...
