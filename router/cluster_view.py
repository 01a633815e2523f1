"""The cluster at one moment, as values, and the account of what this router has put where."""

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pdserve.domain.ids import AttemptId, Epoch, WorkerId
from pdserve.domain.invariants import check_invariant
from pdserve.domain.kv_demand import num_answer_kv_tokens, num_blocks_for
from pdserve.domain.kv_exchange import exchange_obstacle
from pdserve.domain.latency import StepCoefficients, num_attention_pairs
from pdserve.domain.messages import WorkerHello, WorkerLoad


class Health(StrEnum):
    """What a worker that is registered can be; a dead one is not in the view."""

    JOINING = "joining"  # the router's own stream to it is not open
    ALIVE = "alive"
    SUSPECT = "suspect"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, order=True)
class Life:
    """One life of one worker process: a restarted worker has another."""

    worker_id: WorkerId
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestShape:
    """What the prediction needs to know of a request."""

    num_prompt_tokens: int
    max_tokens: int

    @property
    def num_tokens(self) -> int:
        """Prompt and longest answer."""
        return self.num_prompt_tokens + self.max_tokens

    def num_blocks(self, block_size: int) -> int:
        """KV blocks of the whole answer: the most that it can come to hold."""
        num_tokens = num_answer_kv_tokens(self.num_prompt_tokens, self.max_tokens)
        return num_blocks_for(num_tokens, block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """What this router has put on one worker and not taken back."""

    num_requests: int = 0
    num_blocks: int = 0  # of whole answers
    num_context_tokens: int = 0  # prompts of requests that decode here, and their tokens so far
    num_unread_tokens: int = 0  # prompts to be read here, first token not seen yet
    num_unread_pairs: int = 0  # their attention pairs

    def plus(self, other: "Assigned", sign: int = 1) -> "Assigned":
        return Assigned(
            num_requests=self.num_requests + sign * other.num_requests,
            num_blocks=self.num_blocks + sign * other.num_blocks,
            num_context_tokens=self.num_context_tokens + sign * other.num_context_tokens,
            num_unread_tokens=self.num_unread_tokens + sign * other.num_unread_tokens,
            num_unread_pairs=self.num_unread_pairs + sign * other.num_unread_pairs,
        )


NOTHING = Assigned()


def work_of_others(load: WorkerLoad, assigned: Assigned) -> Assigned:
    """What a report has beyond the account of its moment."""
    in_use = load.kv.total - load.kv.free
    return Assigned(
        num_requests=max(0, load.num_running + load.num_waiting - assigned.num_requests),
        num_blocks=max(0, in_use - assigned.num_blocks),
        num_context_tokens=max(0, load.running_context_tokens - assigned.num_context_tokens),
        num_unread_tokens=max(0, load.waiting_prompt_tokens - assigned.num_unread_tokens),
    )


class Ledger:
    """The account: every attempt's part at its decode worker and at the reader of its prompt.

    Each part is added once and taken back once, whatever the order of `hear` and `release`, so an
    idle router has `NOTHING` on every worker.
    """

    def __init__(self) -> None:
        self._assigned: dict[WorkerId, Assigned] = {}
        self._decoding: dict[AttemptId, tuple[WorkerId, Assigned]] = {}
        self._reading: dict[AttemptId, tuple[WorkerId, Assigned]] = {}

    def assigned(self, worker_id: WorkerId) -> Assigned:
        return self._assigned.get(worker_id, NOTHING)

    @property
    def num_unread(self) -> int:
        """Attempts that wait for their first token."""
        return len(self._reading)

    @property
    def is_empty(self) -> bool:
        return not (self._assigned or self._decoding or self._reading)

    def assign(
        self,
        attempt: AttemptId,
        shape: RequestShape,
        *,
        decode: WorkerId,
        reader: WorkerId,
        block_size: int,
    ) -> None:
        """Add one attempt; `reader` is the decode worker itself where it reads the prompt."""
        check_invariant(attempt not in self._decoding, "an attempt is booked once", attempt)
        num_prompt = shape.num_prompt_tokens
        decoding = Assigned(
            num_requests=1,
            num_blocks=shape.num_blocks(block_size),
            num_context_tokens=num_prompt,
        )
        reading = Assigned(
            num_requests=int(reader != decode),
            num_unread_tokens=num_prompt,
            num_unread_pairs=num_attention_pairs(0, num_prompt),
        )
        self._decoding[attempt] = (decode, decoding)
        self._reading[attempt] = (reader, reading)
        self._add(decode, decoding, 1)
        self._add(reader, reading, 1)

    def hear(self, attempt: AttemptId, num_tokens: int) -> None:
        """Tokens of its answer came: its context has grown, and its prompt is read."""
        self.mark_read(attempt)
        if (held := self._decoding.get(attempt)) is not None:
            worker_id, part = held
            more = Assigned(num_context_tokens=num_tokens)
            self._decoding[attempt] = (worker_id, part.plus(more))
            self._add(worker_id, more, 1)

    def mark_read(self, attempt: AttemptId) -> None:
        """Its first token is known: nothing of its prompt is left to read. Idempotent."""
        if part := self._reading.pop(attempt, None):
            self._add(*part, -1)

    def release(self, attempt: AttemptId) -> None:
        """The attempt is over at every worker. Idempotent."""
        self.mark_read(attempt)
        if part := self._decoding.pop(attempt, None):
            self._add(*part, -1)

    def _add(self, worker_id: WorkerId, part: Assigned, sign: int) -> None:
        total = self.assigned(worker_id).plus(part, sign)
        if total == NOTHING:
            del self._assigned[worker_id]
        else:
            self._assigned[worker_id] = total


class WorkerView(NamedTuple):
    """One worker: what it is, what it last reported, what this router has on it.

    The report also counts the work of other routers but is up to a heartbeat old; the account is
    exact but only ours. So the load is the account, and what the report had beyond the account of
    its moment: our own work that has ended since does not count until the next report.

    A named tuple, since one is made of every worker that has changed since the last request: it
    takes half the time of a frozen dataclass.
    """

    hello: WorkerHello
    load: WorkerLoad
    health: Health
    coefficients: StepCoefficients  # what its steps are taken to cost; all predictions use these
    assigned: Assigned = NOTHING
    others: Assigned = NOTHING  # what `load` had beyond the account of its moment

    @property
    def life(self) -> Life:
        return Life(self.hello.worker_id, self.hello.epoch)

    @property
    def is_usable(self) -> bool:
        return self.health is Health.ALIVE

    @property
    def num_requests(self) -> int:
        return self.assigned.num_requests + self.others.num_requests

    @property
    def num_context_tokens(self) -> int:
        return self.assigned.num_context_tokens + self.others.num_context_tokens

    @property
    def num_unread_tokens(self) -> int:
        return self.assigned.num_unread_tokens + self.others.num_unread_tokens

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request has or is promised; below 0 where some wait for blocks."""
        return self.hello.num_blocks - self.assigned.num_blocks - self.others.num_blocks

    @property
    def kv_format(self) -> Hashable:
        """Workers of one format can exchange KV with the same others."""
        return (self.hello.model_hash, self.hello.layout)

    def can_exchange_kv_with(self, decode: "WorkerView") -> bool:
        """Whether the KV of this prefill worker can go to that decode worker."""
        return exchange_obstacle(decode.hello, self.hello) is None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """All registered workers, by role, in the order of their ids."""

    prefill: tuple[WorkerView, ...] = ()
    decode: tuple[WorkerView, ...] = ()
