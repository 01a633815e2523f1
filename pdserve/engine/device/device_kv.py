"""Paged KV memory on a device, which the host reaches by copies through pinned memory."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pdserve.domain.ids import BlockId, HandoffId
from pdserve.domain.layout import KvLayout
from pdserve.engine.device.device_digest import digest_sums, signed_keys
from pdserve.engine.device.runtime import DeviceRuntime
from pdserve.engine.digest import digest_keys
from pdserve.engine.kv_store import BlockRun, HostBuffer
from pdserve.engine.paged_cache import DTYPES
from pdserve.engine.threads import run_to_end

T = TypeVar("T")

STAGING_BYTES = 16 << 20
MAX_AT_ONCE = 2048  # blocks that are digested or checked together
_TOLD_BYTES = 24  # for each: its number and two keys
_DIGESTED_BYTES = 64 << 20  # of blocks at once: intermediate results are as large


class DeviceKv:
    """Satisfies `KvStore` in a device's memory: one plain allocation, block 0 first, zeroed.

    All that touches blocks from here is done on a stream of its own, by one thread, which waits for
    it. So a call that has returned has read or written its blocks, and the next step may follow;
    the caller must not name blocks that a step under way writes.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, runtime: DeviceRuntime) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.num_bytes = layout.block_bytes * num_blocks
        self._runtime = runtime
        self._memory = runtime.empty(num_blocks, layout.block_bytes, dtype=torch.uint8)
        self._memory.zero_()
        runtime.synchronize()
        self._stream = runtime.stream()
        self._blocks_at_once = max(1, min(num_blocks, STAGING_BYTES // layout.block_bytes))
        self._staging = runtime.pinned(self._blocks_at_once * layout.block_bytes)
        self._small = runtime.pinned(MAX_AT_ONCE * _TOLD_BYTES)
        self._thread = ThreadPoolExecutor(1, "kv")

    def host_blocks(self, block_ids: Sequence[BlockId]) -> None:
        return None

    def tensor(self) -> Tensor:
        return self._memory

    async def copy_in(self, source: HostBuffer, runs: Sequence[BlockRun]) -> None:
        def copy(is_cancelled: Callable[[], bool]) -> None:
            size, given = self.layout.block_bytes, np.frombuffer(source, np.uint8)
            staging = self._staging.tensor
            for batch in _batches(runs, self._blocks_at_once):
                if is_cancelled():
                    return
                place = 0
                for run in batch:
                    end = place + run.count * size
                    start = run.remote * size
                    staged = staging[place:end]
                    staged.numpy()[:] = given[start : start + run.count * size]
                    target = self._memory[run.local : run.local + run.count].view(-1)
                    self._runtime.copy(target, staged)
                    place = end
                self._runtime.record().wait()

        await self._work(copy)

    async def copy_within(self, source: Tensor, runs: Sequence[BlockRun]) -> None:
        def copy(is_cancelled: Callable[[], bool]) -> None:
            size = self.layout.block_bytes
            for batch in _batches(runs, self._blocks_at_once):
                if is_cancelled():
                    return
                for run in batch:
                    given = source[run.remote * size : (run.remote + run.count) * size]
                    target = self._memory[run.local : run.local + run.count].view(-1)
                    self._runtime.copy(target, given)
                self._runtime.record().wait()

        await self._work(copy)

    async def copy_out(self, target: HostBuffer, runs: Sequence[BlockRun]) -> None:
        def copy(is_cancelled: Callable[[], bool]) -> None:
            size, wanted = self.layout.block_bytes, np.frombuffer(target, np.uint8)
            staging = self._staging.tensor
            for batch in _batches(runs, self._blocks_at_once):
                if is_cancelled():
                    return
                place = 0
                for run in batch:
                    end = place + run.count * size
                    source = self._memory[run.local : run.local + run.count].view(-1)
                    self._runtime.copy(staging[place:end], source)
                    place = end
                self._runtime.record().wait()
                place = 0
                for run in batch:
                    end, start = place + run.count * size, run.remote * size
                    wanted[start : start + run.count * size] = staging[place:end].numpy()
                    place = end

        await self._work(copy)

    async def digests(
        self, handoff: HandoffId, block_indices: Sequence[int], block_ids: Sequence[BlockId]
    ) -> list[bytes]:
        """Computed where the blocks lie; 16 bytes of each come to the host."""
        keys = [digest_keys(handoff, each, self.layout.block_bytes) for each in block_indices]

        def digest(is_cancelled: Callable[[], bool]) -> list[bytes]:
            at_once = max(1, min(_DIGESTED_BYTES // self.layout.block_bytes, MAX_AT_ONCE))
            found: list[bytes] = []
            for first in range(0, len(keys), at_once):
                if is_cancelled():
                    return found
                part = slice(first, first + at_once)
                found += self._digest(keys[part], block_ids[part])
            return found

        return await self._work(digest)

    @torch.inference_mode()
    def _digest(self, keys: list[tuple[int, int]], block_ids: Sequence[BlockId]) -> list[bytes]:
        count = len(block_ids)
        given = np.concatenate(
            [np.array(block_ids, dtype=np.int64)[:, None], signed_keys(keys)], axis=1
        )
        sent = self._small.tensor[: given.nbytes].view(torch.int64).view(count, 3)
        sent.numpy()[:] = given
        told = self._runtime.empty(count, 3, dtype=torch.int64)
        self._runtime.copy(told, sent)
        blocks = self._memory.index_select(0, told[:, 0])
        sums = digest_sums(blocks, told[:, 1:])
        self._runtime.copy(sent[:, :2], sums)
        self._runtime.record().wait()
        return [row.tobytes() for row in sent[:, :2].numpy().astype("<i8")]

    async def are_sound(self, block_ids: Sequence[BlockId]) -> list[bool]:
        def check(is_cancelled: Callable[[], bool]) -> list[bool]:
            at_once = max(1, min(_DIGESTED_BYTES // self.layout.block_bytes, MAX_AT_ONCE))
            found: list[bool] = []
            for first in range(0, len(block_ids), at_once):
                if is_cancelled():
                    return found
                found += self._are_finite(block_ids[first : first + at_once])
            return found

        return await self._work(check)

    @torch.inference_mode()
    def _are_finite(self, block_ids: Sequence[BlockId]) -> list[bool]:
        count = len(block_ids)
        places = self._small.tensor[: 8 * count].view(torch.int64)
        places.numpy()[:] = block_ids
        told = self._runtime.empty(count, dtype=torch.int64)
        self._runtime.copy(told, places)
        numbers = self._memory.index_select(0, told).view(DTYPES[self.layout.dtype])
        answers = self._small.tensor[8 * count : 9 * count]
        self._runtime.copy(answers, torch.isfinite(numbers).all(1).to(torch.uint8))
        self._runtime.record().wait()
        return [bool(answer) for answer in answers.numpy()]

    async def _work(self, work: Callable[[Callable[[], bool]], T]) -> T:
        def on_stream(is_cancelled: Callable[[], bool]) -> T:
            return self._on_stream(lambda: work(is_cancelled))

        return await run_to_end(on_stream, self._thread)

    def _on_stream(self, work: Callable[[], T]) -> T:
        with self._runtime.on(self._stream):
            return work()

    def close(self) -> None:
        """Steps that use the memory are over; safe to call twice."""
        self._thread.shutdown(wait=True)
        self._staging.close()
        self._small.close()
        self._memory = torch.empty(0, self.layout.block_bytes, dtype=torch.uint8)


def _batches(runs: Sequence[BlockRun], num_blocks: int) -> "list[list[BlockRun]]":
    """The same copies in the same order, cut so that each list has at most `num_blocks` blocks."""
    batches: list[list[BlockRun]] = [[]]
    room = num_blocks
    for run in runs:
        done = 0
        while done < run.count:
            if not room:
                batches.append([])
                room = num_blocks
            count = min(room, run.count - done)
            batches[-1].append(BlockRun(run.remote + done, run.local + done, count))
            done, room = done + count, room - count
    return [batch for batch in batches if batch]
