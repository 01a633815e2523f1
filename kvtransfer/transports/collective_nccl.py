"""Groups of two between GPUs: NCCL, between slots in device memory. Only a GPU can run this."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from kvtransfer.transports.collective_groups import (
    NUM_SLOTS,
    ExchangeStore,
    PairTerms,
    failing_in,
)
from pdserve.engine.kv_store import BlockRun, KvStore
from pdserve.engine.threads import run_to_end

_cuda: Any = torch.cuda
_dist: Any = torch.distributed  # much of what is used here has no types

_MAX_CTAS = 4  # a communicator takes memory and processors by its channels
_POLL_S = 5e-5
_OURS = {  # deadlines are kept here: NCCL's watchdog would end the process
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
_environment = threading.Lock()


def is_nccl_there() -> bool:
    return bool(_dist.is_available() and _dist.is_nccl_available())


class NcclPair:
    """Satisfies `PairGroup` for blocks in a device's memory."""

    def __init__(self, store: ExchangeStore, terms: PairTerms, device: torch.device) -> None:
        self._peer = 1 - terms.rank
        self._deadline_s = terms.move_s
        self._device = device
        self._slots = [
            torch.empty(terms.slot_bytes, dtype=torch.uint8, device=device)
            for _ in range(NUM_SLOTS)
        ]
        self._moves = _cuda.Stream(device)
        self._copies = _cuda.Stream(device)
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=terms.make_s)
        options.config.blocking = 0
        options.config.max_ctas = _MAX_CTAS
        with _settings_of_ours():
            self._group: Any = failing_in(
                terms.make_s, lambda: _dist.ProcessGroupNCCL(store, terms.rank, 2, options)
            )
        failing_in(terms.make_s, lambda: self._group.eager_connect_single_device(device))

    def send(self, slot: int, num_bytes: int) -> None:
        part = [self._slots[slot][:num_bytes]]
        self._move(lambda: self._group.send(part, self._peer, 0))

    def receive(self, slot: int, num_bytes: int) -> None:
        part = [self._slots[slot][:num_bytes]]
        self._move(lambda: self._group.recv(part, self._peer, 0))

    def _move(self, start: Callable[[], Any]) -> None:
        """`wait` only orders streams: that it is over is learnt from an event, by our deadline."""

        def submit() -> Any:
            with _cuda.stream(self._moves):
                start().wait()
                event = _cuda.Event()
                event.record(self._moves)
            return event

        until_s = time.monotonic() + self._deadline_s
        event = failing_in(self._deadline_s, submit)
        while not failing_in(self._deadline_s, event.query):
            if time.monotonic() > until_s:
                raise TimeoutError
            time.sleep(_POLL_S)

    async def gather(self, slot: int, memory: KvStore, runs: Sequence[BlockRun]) -> None:
        def copy(blocks: Tensor, ids: Tensor, staged: Tensor) -> None:
            torch.index_select(blocks, 0, ids, out=staged)

        await self._copy(slot, memory, runs, copy)

    async def scatter(self, slot: int, memory: KvStore, runs: Sequence[BlockRun]) -> None:
        def copy(blocks: Tensor, ids: Tensor, staged: Tensor) -> None:
            blocks.index_copy_(0, ids, staged)

        await self._copy(slot, memory, runs, copy)

    async def _copy(
        self,
        slot: int,
        memory: KvStore,
        runs: Sequence[BlockRun],
        copy: Callable[[Tensor, Tensor, Tensor], None],
    ) -> None:
        """On a stream of its own, which is waited for: others may touch the blocks afterwards."""
        order = [run.local + each for run in runs for each in range(run.count)]
        size = memory.layout.block_bytes

        def work(is_cancelled: Callable[[], bool]) -> None:
            if is_cancelled():
                return
            with torch.inference_mode(), _cuda.stream(self._copies):
                ids = torch.tensor(order, device=self._device)
                copy(memory.tensor(), ids, self._slots[slot][: len(order) * size].view(-1, size))
                self._copies.synchronize()

        await run_to_end(work)

    def close(self) -> None:
        """An abort may hang: whoever calls this does so on a thread that can be given up."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


@contextlib.contextmanager
def _settings_of_ours() -> Iterator[None]:
    """NCCL's groups read them when they are made; those of other groups are put back."""
    with _environment:
        before = {name: os.environ.get(name) for name in _OURS}
        os.environ.update(_OURS)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
