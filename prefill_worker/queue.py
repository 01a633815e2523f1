"""Handoffs that wait for blocks."""

from dataclasses import dataclass

from kvtransfer.sender import HandoffSender
from pdserve.domain.ids import HandoffId
from pdserve.domain.messages import StartHandoff
from pdserve.domain.waiting import WaitingQueue
from pdserve.engine.step_table import StepTable
from pdserve.rpc.streams import PrefillServerLink

PeerHandoff = tuple[PrefillServerLink, HandoffId]


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
    def key(self) -> PeerHandoff:
        return (self.peer, self.handoff)

    @property
    def num_tokens(self) -> int:
        return len(self.start.prompt_token_ids)

    @property
    def num_tokens_left(self) -> int:
        return self.num_tokens - self.num_computed_tokens


PrefillQueue = WaitingQueue[PeerHandoff, PrefillRequest]
