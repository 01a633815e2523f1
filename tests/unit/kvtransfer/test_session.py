from itertools import product

import pytest

from kvtransfer.session import (
    ENDINGS,
    NEXT,
    SAID_BY,
    TERMINAL,
    Event,
    HandoffSession,
    Phase,
    ProtocolViolation,
)
from pdserve.domain.errors import PeerFault
from pdserve.domain.messages import Role

OPEN = [phase for phase in Phase if phase not in TERMINAL and phase is not Phase.IDLE]

READY_WALKS = [
    [Event.START, Event.OFFER, Event.PULL, Event.OFFER, Event.PULL_LAST, Event.SAMPLE],
    [Event.START, Event.OFFER, Event.SAMPLE, Event.PULL, Event.OFFER, Event.PULL_LAST],
    [Event.START, Event.SAMPLE, Event.OFFER, Event.PULL_LAST],
]


def session_in(phase: Phase, role: Role) -> HandoffSession:
    session = HandoffSession(role)
    session.phase = phase
    return session


def walk(session: HandoffSession, events: list[Event]) -> None:
    for event in events:
        if SAID_BY.get(event, session.role) is session.role:
            session.say(event)
        else:
            assert session.hear(event)


def test_every_open_phase_can_end_in_every_way() -> None:
    for phase, event in product(OPEN, ENDINGS):
        assert NEXT[phase, event] in TERMINAL


def test_nothing_leaves_a_terminal_phase() -> None:
    assert not {phase for phase, _ in NEXT} & TERMINAL


def test_every_phase_is_reached_from_idle() -> None:
    reached = {Phase.IDLE}
    for _ in Phase:
        reached |= {after for (before, _), after in NEXT.items() if before in reached}
    assert reached == set(Phase)


def test_from_ready_every_ending_is_a_completion() -> None:
    assert {NEXT[Phase.READY, event] for event in ENDINGS} == {Phase.COMPLETED}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("events", READY_WALKS)
def test_token_and_blocks_make_a_handoff_ready_in_either_order(
    role: Role, events: list[Event]
) -> None:
    session = HandoffSession(role)
    walk(session, events)
    phases = [session.phase]
    walk(session, [Event.END])
    phases.append(session.phase)
    assert phases == [Phase.READY, Phase.COMPLETED]


def test_refusal_is_only_possible_before_the_first_offer() -> None:
    assert {phase for phase, event in NEXT if event is Event.REFUSE} == {Phase.ASKED}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(("phase", "event"), [*product(Phase, Event)])
def test_own_event_follows_the_table_or_is_a_bug(role: Role, phase: Phase, event: Event) -> None:
    session = session_in(phase, role)
    if SAID_BY.get(event, role) is role and (phase, event) in NEXT:
        session.say(event)
        assert session.phase is NEXT[phase, event]
    else:
        with pytest.raises(AssertionError):
            session.say(event)
        assert session.phase is phase


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(("phase", "event"), [*product(Phase, Event)])
def test_peers_event_follows_the_table_is_late_or_is_a_violation(
    role: Role, phase: Phase, event: Event
) -> None:
    session = session_in(phase, role)
    peer = Role.DECODE if role is Role.PREFILL else Role.PREFILL
    if SAID_BY.get(event) is not peer or (phase not in TERMINAL and (phase, event) not in NEXT):
        with pytest.raises(ProtocolViolation):
            session.hear(event)
        assert session.phase is phase
    elif phase in TERMINAL:
        assert not session.hear(event)
        assert session.phase is phase
    else:
        assert session.hear(event)
        assert session.phase is NEXT[phase, event]


def test_a_violation_is_the_peers_fault() -> None:
    assert issubclass(ProtocolViolation, PeerFault)
