"""What KV memory is to those who fill it, move it and check it, wherever it lies."""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pdserve.domain.ids import BlockId, HandoffId
from pdserve.domain.layout import KvLayout

if TYPE_CHECKING:  # whoever moves blocks does without it
    from torch import Tensor

HostBuffer = bytearray | memoryview | mmap.mmap


@dataclass(frozen=True, slots=True)
class BlockRun:
    """`count` blocks that follow each other on both sides."""

    remote: int
    local: int
    count: int


def block_runs(remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> Iterator[BlockRun]:
    """Join pairs that are neighbours on both sides, in order."""
    run: BlockRun | None = None
    for remote, local in zip(remote_blocks, local_blocks, strict=True):
        if run and (remote, local) == (run.remote + run.count, run.local + run.count):
            run = BlockRun(run.remote, run.local, run.count + 1)
            continue
        if run:
            yield run
        run = BlockRun(remote, local, 1)
    if run:
        yield run


class KvBlocks(Protocol):
    """The KV of a worker's blocks, of which each of its ranks holds a part.

    What takes long is a coroutine that leaves the event loop free. Cancelled, it raises once it
    touches nothing any more. Whoever calls it keeps the blocks until then.
    """

    num_blocks: int

    async def digests(
        self, handoff: HandoffId, block_indices: Sequence[int], block_ids: Sequence[BlockId]
    ) -> list[bytes]:
        """Of each block at its place in the prompt: `pdserve.engine.digest.block_digest` of what
        each rank holds of it, joined in rank order.
        """
        ...

    async def are_sound(self, block_ids: Sequence[BlockId]) -> list[bool]:
        """Of each block: no number in it is NaN or infinite, so it may be shared by its name."""
        ...


class KvStore(KvBlocks, Protocol):
    """The KV of one rank: `num_blocks` blocks of `layout.block_bytes`, on the host or a device."""

    layout: KvLayout

    def host_blocks(self, block_ids: Sequence[BlockId]) -> list[memoryview] | None:
        """The bytes of each block, writable; None if they do not lie in the host's memory."""
        ...

    def tensor(self) -> "Tensor":
        """All bytes where they lie: uint8 [num_blocks, block_bytes]."""
        ...

    async def copy_in(self, source: HostBuffer, runs: Sequence[BlockRun]) -> None:
        """Write `local` blocks from `remote` blocks of `source`, host memory of the same layout."""
        ...

    async def copy_within(self, source: "Tensor", runs: Sequence[BlockRun]) -> None:
        """Like `copy_in`, from bytes that lie where the blocks do."""
        ...

    async def copy_out(self, target: HostBuffer, runs: Sequence[BlockRun]) -> None:
        """Write `remote` blocks of `target` from `local` blocks."""
        ...

    def close(self) -> None:
        """Give the memory back; safe to call twice."""
        ...


async def bytes_of(store: KvStore, block_ids: Sequence[BlockId]) -> list[memoryview]:
    """What blocks hold, in order: themselves, or a copy if they are not the host's."""
    if (blocks := store.host_blocks(block_ids)) is not None:
        return blocks
    staging = bytearray(len(block_ids) * store.layout.block_bytes)
    await store.copy_out(staging, list(block_runs(range(len(block_ids)), block_ids)))
    return [memoryview(staging)]
