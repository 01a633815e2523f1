"""Getting a prompt read elsewhere: ask, land its blocks, pass on the first token, or try again."""

import asyncio

import structlog

from decode_worker.prefill_links import PeerLink, PrefillLinks
from decode_worker.requests import Clock, DecodeRequest
from kvtransfer.landing import Landing
from kvtransfer.receiver import HandoffReceiver
from pdserve.domain.errors import PeerFault, Reason, Refused
from pdserve.domain.ids import HandoffId, WorkerId
from pdserve.domain.kv_demand import num_blocks_for
from pdserve.domain.messages import BlocksPulled, KvPath, PrefillDone, PrefillTarget, StartHandoff
from pdserve.observe.watch import NO_DECODE_WATCH, DecodeWatch

log = structlog.get_logger(__name__)

_AS_GOOD_AS_LOST = frozenset({Reason.DRAINING, Reason.CONTEXT_TOO_LONG})


class Handoffs:
    """Fetches KV for requests, and counts what was moved."""

    def __init__(
        self,
        links: PrefillLinks,
        *,
        block_size: int,
        vocab_size: int,
        clock: Clock,
        watch: DecodeWatch = NO_DECODE_WATCH,
    ) -> None:
        self._links = links
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._clock = clock
        self._watch = watch
        self.num_bytes = 0
        self.num_corrupt_blocks = 0

    def kv_paths(self) -> tuple[KvPath, ...]:
        """How the prefill workers are read that are linked to this one."""
        return self._links.kv_paths()

    async def fetch(self, request: DecodeRequest, expires_at_s: float) -> bool:
        """Land the prompt's KV in the request's blocks and take its first token.

        Tries the request's prefill workers in order. Blocks that landed are kept, since their
        content was checked: the next worker is asked for the rest. Returns False when every
        worker was lost, is leaving or is too small, so that the rest must be read here; raises
        `Refused` or `PeerFault` when they refused, or sent KV that did not match.
        """
        worst: PeerFault | Refused | None = None
        for retry, target in enumerate(request.submit.prefill_targets):
            handoff = HandoffId(request.submit.request_id, request.submit.attempt, retry)
            try:
                await self._fetch_from(request, target, handoff, expires_at_s)
            except asyncio.CancelledError:
                self._watch.handoff_ended(Reason.CANCELLED, is_retry=retry > 0)
                raise
            except (PeerFault, Refused) as error:
                self._watch.handoff_ended(error.reason, is_retry=retry > 0)
                log.warning(
                    "handoff.failed",
                    request_id=handoff.request_id,
                    attempt=handoff.attempt,
                    retry=retry,
                    worker_id=target.worker_id,
                    reason=error.reason,
                    why=error.message,
                )
                if error.reason is Reason.UNUSABLE_LOGITS:
                    raise  # the model's doing: it computes the same everywhere
                if worst is None or _severity(error) > _severity(worst):
                    worst = error
            else:
                self._watch.handoff_ended("ok", is_retry=retry > 0)
                return True
            if request.is_answered:
                return True
            if request.num_computed_tokens == request.num_prompt_tokens:
                # All is there but the first token: its logits need the last token once more.
                request.num_computed_tokens -= request.num_output_tokens == 0
                return False
        if worst is not None and _severity(worst) > 0:
            raise worst
        return False

    async def _fetch_from(
        self,
        request: DecodeRequest,
        target: PrefillTarget,
        handoff: HandoffId,
        expires_at_s: float,
    ) -> None:
        assert request.table is not None
        link = await self._links.get(target)
        first_block = request.num_computed_tokens // self._block_size
        num_blocks = num_blocks_for(request.num_prompt_tokens, self._block_size)
        # What has landed of the next block comes again, so that no block is of two workers.
        request.num_computed_tokens = first_block * self._block_size
        receiver = HandoffReceiver(
            handoff,
            reader=link.reader,
            landing=Landing(
                blocks=request.table.block_ids[first_block:num_blocks],
                first_block=first_block,
                block_size=self._block_size,
            ),
            num_tokens=request.num_prompt_tokens,
            vocab_size=self._vocab_size,
            on_first_token=lambda done: _take_first_token(request, link.worker_id, done),
        )
        await link.stream.send(
            StartHandoff(
                handoff=handoff,
                prompt_token_ids=request.submit.prompt_token_ids,
                first_block=receiver.first_block,
                sampling=request.submit.sampling,
                deadline_s=expires_at_s - self._clock(),
                reads_parts=receiver.reads_parts,
            )
        )
        link.open(receiver)
        try:
            await self._land_all(request, link, receiver)
        finally:
            link.close(receiver)
            self.num_bytes += receiver.num_bytes
            self.num_corrupt_blocks += receiver.num_corrupt_blocks
            self._watch.blocks_corrupt(receiver.num_corrupt_blocks)
            request.times.transferred_bytes += receiver.num_bytes

    async def _land_all(
        self, request: DecodeRequest, link: PeerLink, receiver: HandoffReceiver
    ) -> None:
        assert request.table is not None
        while await receiver.wait_offer():
            request.times.first_read_s = request.times.first_read_s or self._clock()
            pulled = await self._land(link, receiver)
            if pulled is None:
                continue
            request.num_computed_tokens = receiver.num_landed_tokens
            request.table.hold_until(num_blocks_for(receiver.num_landed_tokens, self._block_size))
            link.send(pulled)
            if receiver.is_complete:
                request.times.landed_s = self._clock()
            num_full_blocks = request.num_computed_tokens // self._block_size
            await request.table.publish(request.names[:num_full_blocks])

    async def _land(self, link: PeerLink, receiver: HandoffReceiver) -> BlocksPulled | None:
        num_bytes, started_s = receiver.num_bytes, self._clock()
        try:
            return await receiver.land()
        finally:
            if (read_bytes := receiver.num_bytes - num_bytes) > 0:
                elapsed_s = self._clock() - started_s
                name = link.reader.path.transport_name
                self._watch.blocks_read(name, read_bytes, elapsed_s)


def _take_first_token(request: DecodeRequest, worker_id: WorkerId, done: PrefillDone) -> bool:
    """Pass it on at once, before the last blocks are there; False if it is the whole answer."""
    request.times.prefill_worker = worker_id
    request.times.prefill_queue_s = done.queue_s
    request.times.prefill_s = done.prefill_s
    request.num_cached_tokens = max(request.num_cached_tokens, done.cached_tokens)
    if request.num_output_tokens == 0:  # else an earlier worker gave it: the same, by its seed
        request.take(done.first_token)
    return not request.finished.done()


def _severity(error: PeerFault | Refused) -> int:
    """Of several failures, which one says most: corrupt KV, then a refusal, then a loss.

    A worker that drains will be gone soon, and one that can never hold the prompt is as good as
    not there: their refusals are losses.
    """
    if error.reason is Reason.KV_INTEGRITY:
        return 2
    return int(isinstance(error, Refused) and error.reason not in _AS_GOOD_AS_LOST)
