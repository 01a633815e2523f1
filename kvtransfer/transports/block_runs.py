"""Lists of blocks to read: checked once, then joined into runs that are one copy each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdserve.domain.errors import TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.invariants import check_invariant
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_memory import KvMemory


@dataclass(frozen=True, slots=True)
class BlockRun:
    """`count` blocks that follow each other on both sides."""

    remote: int
    local: int
    count: int


def check_read(
    region: RemoteRegion,
    remote_blocks: Sequence[BlockId],
    memory: KvMemory,
    local_blocks: Sequence[BlockId],
) -> None:
    """Raises `TransferFailed` if the peer's side makes no sense; ours is an invariant."""
    num_remote, num_local = len(remote_blocks), len(local_blocks)
    check_invariant(num_remote == num_local, "blocks come in pairs", num_remote, num_local)
    are_ours = all(0 <= block < memory.num_blocks for block in local_blocks)
    check_invariant(are_ours, "blocks land in our memory", local_blocks, memory.num_blocks)
    if region.block_bytes != memory.layout.block_bytes:
        raise TransferFailed(
            f"the peer's blocks have {region.block_bytes} bytes, ours {memory.layout.block_bytes}"
        )
    if not all(0 <= block < region.num_blocks for block in remote_blocks):
        raise TransferFailed(f"a block beyond the peer's {region.num_blocks} asked for")


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
