"""Handoffs that wait for blocks, most urgent first."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvtransfer.sender import HandoffSender
from pdserve.domain.ids import HandoffId
from pdserve.domain.messages import StartHandoff
from pdserve.engine.step_table import StepTable
from pdserve.rpc.streams import PrefillServerLink

MIN_HEAP_TO_COMPACT = 64


@dataclass(slots=True, eq=False, kw_only=True)
class PrefillRequest:
    """One prompt to read, for one decode worker. Times are of this process's clock."""

    start: StartHandoff
    peer: PrefillServerLink
    arrived_s: float
    leave_by_s: float  # its deadline, or the longest wait if that is sooner: the order of the queue
    names: tuple[bytes, ...]  # of the prompt's full blocks
    started_s: float = 0.0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    table: StepTable | None = None
    sender: HandoffSender | None = None

    @property
    def handoff(self) -> HandoffId:
        return self.start.handoff

    @property
    def num_tokens(self) -> int:
        return len(self.start.prompt_token_ids)

    @property
    def num_tokens_left(self) -> int:
        return self.num_tokens - self.num_computed_tokens


PeerHandoff = tuple[PrefillServerLink, HandoffId]


@dataclass(slots=True)
class PrefillQueue:
    """Bounded. A request with a far deadline rises as it waits, so none starves."""

    max_num_queued: int
    num_tokens: int = 0
    _heap: list[tuple[float, int, PrefillRequest]] = field(default_factory=list)
    _live: dict[PeerHandoff, PrefillRequest] = field(default_factory=dict)
    _num_pushed: int = 0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[PrefillRequest]:
        return iter(self._live.values())

    def __contains__(self, key: PeerHandoff) -> bool:
        return key in self._live

    def push(self, request: PrefillRequest) -> bool:
        """Queue a request; False when the queue is full."""
        if len(self._live) >= self.max_num_queued:
            return False
        self._num_pushed += 1
        heapq.heappush(self._heap, (request.leave_by_s, self._num_pushed, request))
        self._live[request.peer, request.handoff] = request
        self.num_tokens += request.num_tokens
        return True

    def peek(self) -> PrefillRequest | None:
        """The most urgent request, left in its place."""
        while self._heap and not self._is_live(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def remove(self, peer: PrefillServerLink, handoff: HandoffId) -> PrefillRequest | None:
        """Take out one request, wherever it stands; None if it does not wait here."""
        request = self._live.pop((peer, handoff), None)
        if request is not None:
            self.num_tokens -= request.num_tokens
            self._compact()
        return request

    def _compact(self) -> None:
        """What was taken out from behind a head that does not fit must not pile up."""
        if len(self._heap) > 2 * len(self._live) + MIN_HEAP_TO_COMPACT:
            self._heap = [entry for entry in self._heap if self._is_live(entry[2])]
            heapq.heapify(self._heap)

    def _is_live(self, request: PrefillRequest) -> bool:
        return self._live.get((request.peer, request.handoff)) is request
