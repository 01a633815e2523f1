"""The life of one handoff as a table: one machine, kept by both ends, without I/O.

Two facts make a handoff ready, and they come in either order: the first token is sampled, and the
last block is pulled. The phases are the four combinations, the first split by whether anything was
heard yet (a prefill worker may refuse only before its first offer):

                          no token yet            first token known
    nothing offered       ASKED
    blocks missing        OFFERED                 SAMPLED
    all blocks pulled     LANDED                  READY

Each end moves when it sends or hears an event, so the two can be apart by the messages in flight.
Any open handoff can end at any time: by the decode worker (END), the prefill worker (FAIL), the
lease (EXPIRE, kept by the prefill worker) or the stream (LOSE). From READY every ending is a
completion, since the decode worker has all it asked for. Because either end may stop on its own,
messages cross: what arrives after the end is dropped, never an error.

An event of our own that the table does not have is a bug (`AssertionError`). The same from a peer
is its fault (`ProtocolViolation`), and the owner of the handoff ends it.

After h11's `_state.py`: https://github.com/python-hyper/h11
"""

from enum import Enum, auto

from pdserve.domain.errors import TransferFailed
from pdserve.domain.invariants import check_invariant
from pdserve.domain.messages import Role


class ProtocolViolation(TransferFailed):
    """The peer said what no correct peer says; its handoff cannot go on."""


class Phase(Enum):
    IDLE = auto()
    ASKED = auto()
    OFFERED = auto()
    SAMPLED = auto()
    LANDED = auto()
    READY = auto()
    COMPLETED = auto()
    ABANDONED = auto()
    REFUSED = auto()
    FAILED = auto()
    EXPIRED = auto()
    LOST = auto()


class Event(Enum):
    START = auto()
    REFUSE = auto()
    OFFER = auto()
    PULL = auto()  # some blocks, more to come
    PULL_LAST = auto()
    SAMPLE = auto()  # the first token
    END = auto()
    FAIL = auto()
    EXPIRE = auto()
    LOSE = auto()


TERMINAL = frozenset(
    {
        Phase.COMPLETED,
        Phase.ABANDONED,
        Phase.REFUSED,
        Phase.FAILED,
        Phase.EXPIRED,
        Phase.LOST,
    }
)

ENDINGS: dict[Event, Phase] = {
    Event.END: Phase.ABANDONED,
    Event.FAIL: Phase.FAILED,
    Event.EXPIRE: Phase.EXPIRED,
    Event.LOSE: Phase.LOST,
}
"""What ends an open handoff, and where to."""

NEXT: dict[tuple[Phase, Event], Phase] = {
    (Phase.IDLE, Event.START): Phase.ASKED,
    (Phase.ASKED, Event.REFUSE): Phase.REFUSED,
    (Phase.ASKED, Event.OFFER): Phase.OFFERED,
    (Phase.ASKED, Event.SAMPLE): Phase.SAMPLED,
    (Phase.OFFERED, Event.OFFER): Phase.OFFERED,
    (Phase.OFFERED, Event.PULL): Phase.OFFERED,
    (Phase.OFFERED, Event.PULL_LAST): Phase.LANDED,
    (Phase.OFFERED, Event.SAMPLE): Phase.SAMPLED,
    (Phase.SAMPLED, Event.OFFER): Phase.SAMPLED,
    (Phase.SAMPLED, Event.PULL): Phase.SAMPLED,
    (Phase.SAMPLED, Event.PULL_LAST): Phase.READY,
    (Phase.LANDED, Event.SAMPLE): Phase.READY,
    **{
        (phase, event): ended
        for phase in (Phase.ASKED, Phase.OFFERED, Phase.SAMPLED, Phase.LANDED)
        for event, ended in ENDINGS.items()
    },
    **{(Phase.READY, event): Phase.COMPLETED for event in ENDINGS},
}

SAID_BY: dict[Event, Role] = {
    Event.START: Role.DECODE,
    Event.PULL: Role.DECODE,
    Event.PULL_LAST: Role.DECODE,
    Event.END: Role.DECODE,
    Event.REFUSE: Role.PREFILL,
    Event.OFFER: Role.PREFILL,
    Event.SAMPLE: Role.PREFILL,
    Event.FAIL: Role.PREFILL,
}
"""Who sends the message behind an event; EXPIRE and LOSE are noticed, not said."""


class HandoffSession:
    """Where one handoff is, as seen from the end that plays `role`."""

    __slots__ = ("phase", "role")

    def __init__(self, role: Role) -> None:
        self.role = role
        self.phase = Phase.IDLE

    @property
    def is_over(self) -> bool:
        return self.phase in TERMINAL

    def say(self, event: Event) -> None:
        """This end did `event` (or noticed it); it must be its turn."""
        is_ours = SAID_BY.get(event, self.role) is self.role
        check_invariant(is_ours, "an end says only what its role says", self.role, event)
        is_legal = (self.phase, event) in NEXT
        check_invariant(is_legal, "a handoff moves by NEXT", self.role, self.phase, event)
        self.phase = NEXT[self.phase, event]

    def hear(self, event: Event) -> bool:
        """The peer did `event`; False if it came too late to matter.

        Raises `ProtocolViolation`, and stays where it is, if the peer may not do that here.
        """
        if SAID_BY.get(event) in (None, self.role):
            raise ProtocolViolation(f"the peer of a {self.role} worker sent {event.name}")
        if self.is_over:
            return False
        if (self.phase, event) not in NEXT:
            raise ProtocolViolation(f"the peer sent {event.name} in phase {self.phase.name}")
        self.phase = NEXT[self.phase, event]
        return True
