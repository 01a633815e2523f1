"""Where a request waits until its blocks are promised; nothing is asked of prefill before."""

import asyncio
from dataclasses import dataclass

from decode_worker.requests import Clock, DecodeRequest
from pdserve.domain.errors import BadRequest, Reason, Refused
from pdserve.domain.kv_demand import num_blocks_for
from pdserve.domain.waiting import Discipline, WaitingQueue
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.step_table import StepTable


@dataclass(slots=True, eq=False)
class _Waiting:
    request: DecodeRequest
    leave_by_s: float
    admitted: asyncio.Future[None]

    @property
    def num_tokens(self) -> int:
        return self.request.num_prompt_tokens


class Intake:
    """The worst case of blocks is reserved, so decode never runs out; who does not fit waits.

    Nobody passes the one whose turn it is.
    A request holds its place from `admit` to `leave`.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_requests: int,
        max_num_queued: int,
        discipline: Discipline,
        queue_s: float,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_num_requests = max_num_requests
        self._queue_s = queue_s
        self._clock = clock
        self._waiting = WaitingQueue[DecodeRequest, _Waiting](discipline, max_num_queued)
        self.num_admitted = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_prompt_tokens(self) -> int:
        return self._waiting.num_tokens

    async def admit(self, request: DecodeRequest) -> None:
        """Reserve `request.table`, waiting for room.

        Raises `Refused` when there is none, and `BadRequest` when there never can be.
        """
        num_blocks = self._num_blocks(request)
        if num_blocks > self._pool.num_blocks:
            raise BadRequest(
                f"prompt and answer need {num_blocks} KV blocks; "
                f"the decode worker has {self._pool.num_blocks}",
                reason=Reason.CONTEXT_TOO_LONG,
            )
        if not self._waiting and self._try_reserve(request):
            return
        await self._wait(request)

    def leave(self, request: DecodeRequest) -> None:
        """Give back the place and the blocks (after the running step, if they are in it)."""
        assert request.table is not None
        self.num_admitted -= 1
        request.table.release()
        self._admit_waiting()

    async def _wait(self, request: DecodeRequest) -> None:
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        leave_by_s = request.times.received_s + min(request.submit.deadline_s, self._queue_s)
        entry = _Waiting(request, leave_by_s, admitted)
        if not self._waiting.push(request, entry):
            raise Refused(
                f"the decode queue holds {len(self._waiting)} requests", retry_after_s=1.0
            )
        if self._waiting.peek() is entry:
            self._admit_waiting()
        try:
            async with asyncio.timeout(self._queue_s):
                await admitted
        except (TimeoutError, asyncio.CancelledError) as error:
            if request.table is not None:  # admitted and given up in the same turn
                self.leave(request)
            elif self._waiting.remove(request) is not None:
                self._admit_waiting()  # whoever stood behind may fit
            if isinstance(error, asyncio.CancelledError):
                raise
            raise Refused(
                f"no KV blocks came free within {self._queue_s:g} s", reason=Reason.QUEUE_TIMEOUT
            ) from None

    def _num_blocks(self, request: DecodeRequest) -> int:
        return num_blocks_for(request.max_num_kv_tokens, self._block_size)

    def _try_reserve(self, request: DecodeRequest) -> bool:
        if self.num_admitted >= self._max_num_requests:
            return False
        # The last token is always computed, for its logits.
        reusable = request.names[: (request.num_prompt_tokens - 1) // self._block_size]
        table = self._pool.reserve(self._num_blocks(request), reusable)
        if table is None:
            return False
        self.num_admitted += 1
        request.table = StepTable(table, self._admit_waiting)
        request.num_computed_tokens = table.num_cached_blocks * self._block_size
        request.num_cached_tokens = request.num_computed_tokens
        request.times.reserved_s = self._clock()
        return True

    def _admit_waiting(self) -> None:
        while (entry := self._waiting.peek()) is not None:
            if not entry.admitted.cancelled():
                if not self._try_reserve(entry.request):
                    return
                entry.admitted.set_result(None)
            self._waiting.remove(entry.request)
