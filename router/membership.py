"""Who is in the cluster: registered workers, their last report, and when silence is death.

Time is handed in. A worker is suspect after `suspect_s` of silence (it gets no new requests) and
dead after `dead_s`, or as soon as its stream ends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from pdserve.config.timers import Timers
from pdserve.domain.errors import PeerFault, Reason, WorkerLost
from pdserve.domain.ids import PROTOCOL_VERSION, WorkerId
from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.messages import Reads, Role, WorkerHello, WorkerLoad, WorkerState
from router.admission import ServedModel
from router.capacity import max_kv_tokens, roomiest
from router.cluster_view import (
    NOTHING,
    Assigned,
    ClusterView,
    Health,
    Ledger,
    Life,
    WorkerView,
    work_of_others,
)
from router.decode_links import DecodeLink
from router.step_times import step_times

MAX_WORKER_ID_CHARS = 64
DECODE = Role.DECODE


@dataclass(slots=True, eq=False)
class Member:
    """One registration; a worker that registers again gets another."""

    hello: WorkerHello
    load: WorkerLoad
    heard_s: float
    on_replaced: Callable[[], None]
    coefficients: StepCoefficients
    link: DecodeLink | None = None  # decode only: while its stream is open
    others: Assigned = NOTHING
    view: WorkerView | None = None  # the last that was made of it

    @property
    def life(self) -> Life:
        return Life(self.hello.worker_id, self.hello.epoch)


class Membership:
    """The registered workers."""

    def __init__(self, *, timers: Timers, ledger: Ledger, tokenizer_hash: bytes = b"") -> None:
        self._timers = timers
        self._ledger = ledger
        self._tokenizer_hash = tokenizer_hash
        self._members: dict[WorkerId, Member] = {}
        self._step_times_at_s: float | None = None  # None: the members have changed
        self.num_stale_reports = 0

    def admit(
        self, hello: WorkerHello, now_s: float, on_replaced: Callable[[], None] = lambda: None
    ) -> Member:
        """Add a worker; one with the same id is replaced, and told so through `on_replaced`.

        Raises `PeerFault` with INCOMPATIBLE_PEER for one that cannot serve with the others.
        """
        self._check(hello)
        member = Member(hello, _idle_load(hello), now_s, on_replaced, hello.coefficients)
        old = self._members.get(hello.worker_id)
        self._members = dict(sorted({**self._members, hello.worker_id: member}.items()))
        self._step_times_at_s = None
        if old is not None:
            old.on_replaced()
        return member

    def hear(self, member: Member, load: WorkerLoad, now_s: float) -> None:
        """Take a heartbeat; one that is older than the last is counted and dropped."""
        if load.sequence < member.load.sequence:
            self.num_stale_reports += 1
            return
        member.load = load
        member.heard_s = now_s
        member.others = work_of_others(load, self._ledger.assigned(member.hello.worker_id))

    def excuse(self, member: Member, now_s: float) -> None:
        """Count silence from now on: the past one was not the worker's."""
        member.heard_s = now_s

    def dismiss(self, member: Member) -> None:
        """Its stream is over or it went silent: dead at once. Nothing if it has been replaced."""
        if self._members.get(member.hello.worker_id) is member:
            del self._members[member.hello.worker_id]
            self._step_times_at_s = None

    def dead_at_s(self, member: Member) -> float:
        """When silence from now on makes it dead."""
        return member.heard_s + self._timers.dead_s

    def link(self, life: Life) -> DecodeLink:
        """The open stream to a decode worker that a view just showed as alive or suspect.

        A view shows a worker so only while it has a link, and both are read from the same member:
        who asks without an `await` in between is never refused. Raises `WorkerLost` otherwise.
        """
        member = self._members.get(life.worker_id)
        if member is None or member.life != life or member.link is None:
            raise WorkerLost("the decode worker cannot be reached")
        return member.link

    def view(self, now_s: float) -> ClusterView:
        """Made for every request, from the last views of those workers that have not changed."""
        self._refresh_step_times(now_s)
        oldest_s, assigned_to = now_s - self._timers.suspect_s, self._ledger.assigned
        prefill: list[WorkerView] = []
        decode: list[WorkerView] = []
        for worker_id, member in self._members.items():
            hello, view = member.hello, member.view
            assigned, health = assigned_to(worker_id), _health(member, oldest_s)
            if (
                view is None
                or view.assigned is not assigned
                or view.others is not member.others
                or view.health is not health
                or view.coefficients is not member.coefficients
            ):
                view = WorkerView(
                    hello, member.load, health, member.coefficients, assigned, member.others
                )
                member.view = view
            (decode if hello.role is DECODE else prefill).append(view)
        return ClusterView(prefill=tuple(prefill), decode=tuple(decode))

    def served_model(self, name: str) -> ServedModel | None:
        """The model as the workers describe it; None while no decode worker is registered."""
        hellos = [member.hello for member in self._members.values()]
        decode = [hello for hello in hellos if hello.role is Role.DECODE]
        if not decode:
            return None
        largest = roomiest(decode)
        return ServedModel(
            name=name,
            max_context_tokens=largest.max_context_tokens,
            max_kv_tokens=max_kv_tokens(largest),
            vocab_size=min(hello.vocab_size for hello in hellos),
        )

    def worker_states(self, now_s: float) -> tuple[WorkerState, ...]:
        """For operators."""
        view = self.view(now_s)
        return tuple(
            WorkerState(
                hello=worker.hello,
                load=worker.load,
                health=worker.health,
                silence_s=now_s - self._members[worker.hello.worker_id].heard_s,
                num_assigned=worker.assigned.num_requests,
                coefficients=worker.coefficients,
            )
            for worker in (*view.prefill, *view.decode)
        )

    def _refresh_step_times(self, now_s: float) -> None:
        """Once a heartbeat: reports come no faster, and a view is made for every request."""
        at_s = self._step_times_at_s
        if at_s is None or now_s - at_s >= self._timers.heartbeat_s:
            times = step_times((each.hello, each.load) for each in self._members.values())
            for worker_id, member in self._members.items():
                member.coefficients = times[worker_id]
            self._step_times_at_s = now_s

    def _check(self, hello: WorkerHello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            _refuse(f"protocol version must be {PROTOCOL_VERSION}; got {hello.protocol_version}")
        if not (0 < len(hello.worker_id) <= MAX_WORKER_ID_CHARS and hello.address):
            _refuse("a worker needs an id of at most 64 characters and an address")
        if (hello.role is Role.PREFILL) is not (hello.reads is Reads.OTHERS):
            _refuse(
                "a prefill worker reads the prompts of others, a decode worker its own or none; "
                f"a {hello.role} worker says {hello.reads}"
            )
        if not _has_sane_sizes(hello):
            _refuse("sizes must be at least 1 and step times finite and not negative")
        expected = self._tokenizer_hash
        if expected and hello.tokenizer_hash and hello.tokenizer_hash != expected:
            _refuse(f"the router's tokenizer is {expected.hex()}; got {hello.tokenizer_hash.hex()}")
        for other in self._members.values():
            # The worker's own past life does not bind it: it may come back with another model.
            is_same_worker = other.hello.worker_id == hello.worker_id
            if not is_same_worker and other.hello.model_hash != hello.model_hash:
                model_hash = other.hello.model_hash.hex()
                _refuse(f"the pool's model is {model_hash}; got {hello.model_hash.hex()}")


def _health(member: Member, oldest_s: float) -> Health:
    """`oldest_s` is when the last report of one that is not suspect may have come."""
    if member.link is None and member.hello.role is DECODE:
        return Health.JOINING  # whatever else it is: no request can be sent to it
    if member.heard_s < oldest_s:
        return Health.SUSPECT
    return Health.DRAINING if member.load.is_draining else Health.ALIVE


def _has_sane_sizes(hello: WorkerHello) -> bool:
    sizes = (
        hello.max_context_tokens,
        hello.vocab_size,
        hello.block_size,
        hello.num_blocks,
        hello.max_num_requests,
        hello.max_step_tokens,
        hello.num_stages,
    )
    times = [getattr(hello.coefficients, entry.name) for entry in fields(StepCoefficients)]
    return min(sizes) >= 1 and all(math.isfinite(time) and time >= 0 for time in times)


def _refuse(message: str) -> None:
    raise PeerFault(message, reason=Reason.INCOMPATIBLE_PEER)


def _idle_load(hello: WorkerHello) -> WorkerLoad:
    """What is assumed until the first heartbeat."""
    kv = KvUsage(free=hello.num_blocks, reserved=0, held=0, pinned=0, total=hello.num_blocks)
    return WorkerLoad(
        sequence=0,
        num_waiting=0,
        num_running=0,
        waiting_prompt_tokens=0,
        running_context_tokens=0,
        kv=kv,
    )
