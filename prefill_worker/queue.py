"""Handoffs that wait for blocks."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvtransfer.sender import HandoffSender
from pdserve.domain.ids import HandoffId
from pdserve.domain.messages import StartHandoff
from pdserve.domain.waiting import Discipline, WaitingQueue
from pdserve.engine.step_table import StepTable
from pdserve.rpc.streams import PrefillServerLink


@dataclass(slots=True, eq=False, kw_only=True)
class PrefillRequest:
    """One prompt to read, for one decode worker. Times are of this process's clock."""

    start: StartHandoff
    peer: PrefillServerLink
    arrived_s: float
    leave_by_s: float  # its deadline, or the longest wait if that is sooner
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


class PrefillQueue:
    """Bounded."""

    def __init__(self, max_num_waiting: int, discipline: Discipline) -> None:
        self._max_num_waiting = max_num_waiting
        self._waiting: WaitingQueue[PrefillRequest] = WaitingQueue(discipline)
        self._by_key: dict[PeerHandoff, PrefillRequest] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[PrefillRequest]:
        return iter(self._waiting)

    def __contains__(self, key: PeerHandoff) -> bool:
        return key in self._by_key

    def push(self, request: PrefillRequest) -> bool:
        """Queue a request; False when the queue is full."""
        if len(self) >= self._max_num_waiting:
            return False
        self._waiting.push(request)
        self._by_key[request.peer, request.handoff] = request
        self.num_tokens += request.num_tokens
        return True

    def peek(self) -> PrefillRequest | None:
        """The request whose turn it is, left in its place."""
        return self._waiting.peek()

    def remove(self, peer: PrefillServerLink, handoff: HandoffId) -> PrefillRequest | None:
        """Take out one request, wherever it stands; None if it does not wait here."""
        request = self._by_key.pop((peer, handoff), None)
        if request is not None:
            self._waiting.remove(request)
            self.num_tokens -= request.num_tokens
        return request
