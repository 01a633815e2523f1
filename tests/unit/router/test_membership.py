"""Who is registered, in whose view, and when; time is a number here."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.config.timers import Timers
from pdserve.domain.errors import PeerFault, Reason, WorkerLost
from pdserve.domain.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.messages import Role
from router.cluster_view import Health, Ledger, RequestShape
from router.membership import Membership
from tests.unit.router.builders import COEFFICIENTS, make_hello, make_load
from tests.unit.router.played_cluster import open_link

TIMERS = Timers(suspect_s=1.5, dead_s=3.0)


def make_membership(tokenizer_hash: bytes = b"") -> Membership:
    return Membership(timers=TIMERS, ledger=Ledger(), tokenizer_hash=tokenizer_hash)


async def test_silent_worker_is_suspect_then_dead_and_a_heartbeat_clears_it() -> None:
    membership = make_membership()
    member = membership.admit(make_hello("d0"), 10.0)
    assert membership.view(10.0).decode[0].health is Health.JOINING
    member.link = open_link(member)
    assert membership.view(11.5).decode[0].health is Health.ALIVE
    assert membership.view(11.6).decode[0].health is Health.SUSPECT
    assert membership.dead_at_s(member) == 13.0
    membership.hear(member, make_load(sequence=1), 12.0)
    assert membership.view(12.1).decode[0].health is Health.ALIVE
    assert membership.dead_at_s(member) == 15.0


async def test_draining_worker_is_shown_as_draining() -> None:
    membership = make_membership()
    member = membership.admit(make_hello("d0"), 0.0)
    member.link = open_link(member)
    membership.hear(member, make_load(is_draining=True), 0.5)
    assert membership.view(0.6).decode[0].health is Health.DRAINING


async def test_worker_that_lost_its_link_is_offered_to_no_request_however_silent_it_is() -> None:
    membership = make_membership()
    member = membership.admit(make_hello("d0"), 0.0)
    member.link = open_link(member)
    assert membership.view(2.0).decode[0].health is Health.SUSPECT
    assert membership.link(member.life) is member.link
    member.link = None
    assert membership.view(2.0).decode[0].health is Health.JOINING
    with pytest.raises(WorkerLost):
        membership.link(member.life)


async def test_link_to_a_life_that_was_replaced_is_not_given_out() -> None:
    membership = make_membership()
    old = membership.admit(make_hello("d0"), 0.0)
    old.link = open_link(old)
    new = membership.admit(make_hello("d0", epoch=Epoch(2)), 1.0)
    assert membership.view(1.0).decode[0].health is Health.JOINING
    for life in (old.life, new.life):
        with pytest.raises(WorkerLost):
            membership.link(life)


def test_dismissed_worker_is_in_no_view() -> None:
    membership = make_membership()
    member = membership.admit(make_hello("d0"), 0.0)
    membership.dismiss(member)
    membership.dismiss(member)
    assert membership.view(0.0).decode == ()
    assert membership.served_model("demo") is None


def test_new_epoch_replaces_the_old_life_and_tells_it() -> None:
    told: list[str] = []
    membership = make_membership()
    old = membership.admit(make_hello("d0"), 0.0, lambda: told.append("old"))
    new = membership.admit(make_hello("d0", epoch=Epoch(2)), 1.0, lambda: told.append("new"))
    assert told == ["old"]
    membership.dismiss(old)  # its stream ends later: that is not the new life's death
    [worker] = membership.view(1.0).decode
    assert worker.life == new.life


def test_late_heartbeat_of_an_older_sequence_is_counted_and_dropped() -> None:
    membership = make_membership()
    member = membership.admit(make_hello("d0"), 0.0)
    membership.hear(member, make_load(sequence=5, num_running=3), 1.0)
    membership.hear(member, make_load(sequence=4, num_running=7), 2.0)
    assert member.load.num_running == 3
    assert member.heard_s == 1.0
    assert membership.num_stale_reports == 1


async def test_decode_worker_is_usable_once_its_stream_is_open() -> None:
    membership = make_membership()
    member = membership.admit(make_hello("d0"), 0.0)
    assert not membership.view(0.0).decode[0].is_usable
    member.link = open_link(member)
    assert membership.view(0.0).decode[0].is_usable
    membership.admit(make_hello("p0", Role.PREFILL), 0.0)
    assert membership.view(0.0).prefill[0].is_usable


@pytest.mark.parametrize(
    "change",
    [
        {"protocol_version": 99},
        {"model_hash": b"another"},
        {"tokenizer_hash": b"another"},
        {"worker_id": ""},
        {"worker_id": "w" * 65},
        {"address": ""},
        {"block_size": 0},
        {"num_blocks": 0},
        {"vocab_size": 0},
        {"max_context_tokens": 0},
        {"max_num_requests": 0},
        {"max_step_tokens": 0},
        {"coefficients": replace(COEFFICIENTS, fixed_s=float("nan"))},
        {"coefficients": replace(COEFFICIENTS, decode_token_s=-1.0)},
    ],
)
def test_worker_that_cannot_serve_with_the_others_is_refused(change: dict[str, Any]) -> None:
    membership = make_membership(tokenizer_hash=b"tokenizer")
    membership.admit(make_hello("p0", Role.PREFILL, tokenizer_hash=b"tokenizer"), 0.0)
    with pytest.raises(PeerFault) as caught:
        membership.admit(make_hello("d0", **change), 0.0)
    assert caught.value.reason is Reason.INCOMPATIBLE_PEER
    assert membership.view(0.0).decode == ()


def test_sole_worker_may_come_back_with_another_model() -> None:
    membership = make_membership()
    membership.admit(make_hello("d0"), 0.0)
    membership.admit(make_hello("d0", epoch=Epoch(2), model_hash=b"another"), 1.0)
    assert membership.view(1.0).decode[0].hello.model_hash == b"another"


def test_served_model_is_what_the_largest_decode_worker_can_do() -> None:
    membership = make_membership()
    membership.admit(make_hello("p0", Role.PREFILL, max_context_tokens=512), 0.0)
    assert membership.served_model("demo") is None  # prefill workers alone serve nothing
    membership.admit(make_hello("d0", num_blocks=10), 0.0)
    membership.admit(make_hello("d1", num_blocks=20), 0.0)
    model = membership.served_model("demo")
    assert model is not None
    # The prefill worker's context bounds nothing: decode workers can read prompts, too.
    assert (model.max_context_tokens, model.max_kv_tokens, model.vocab_size) == (1024, 320, 2048)
    membership.admit(make_hello("d2", num_blocks=90, max_context_tokens=200), 0.0)
    model = membership.served_model("demo")
    assert model is not None
    assert (model.max_context_tokens, model.max_kv_tokens) == (1024, 320)  # of one worker


def test_view_and_operators_see_what_is_assigned() -> None:
    ledger = Ledger()
    membership = Membership(timers=TIMERS, ledger=ledger)
    membership.admit(make_hello("d0"), 0.0)
    membership.admit(make_hello("p0", Role.PREFILL), 0.0)
    attempt = AttemptId(RequestId("r"), 1)
    shape = RequestShape(num_prompt_tokens=20, max_tokens=14)
    ledger.assign(attempt, shape, decode=WorkerId("d0"), reader=WorkerId("p0"), block_size=16)
    view = membership.view(0.0)
    assert view.decode[0].assigned.num_blocks == 3
    assert view.prefill[0].assigned.num_unread_tokens == 20
    states = {state.hello.worker_id: state for state in membership.worker_states(0.25)}
    assert states[WorkerId("d0")].num_assigned == states[WorkerId("p0")].num_assigned == 1
    assert states[WorkerId("d0")].silence_s == 0.25
    ledger.mark_read(attempt)
    assert membership.view(0.0).prefill[0].assigned.num_requests == 0
    ledger.release(attempt)
    assert ledger.is_empty


EVENTS = ("report", "assign", "hear", "release", "link", "unlink", "pass", "admit", "dismiss")


@given(events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 3)), max_size=40))
def test_view_is_that_of_the_moment_whatever_was_shown_before(
    events: list[tuple[str, int]],
) -> None:
    ledger = Ledger()
    membership = Membership(timers=TIMERS, ledger=ledger)
    hellos = [make_hello(name) for name in ("d0", "d1")]
    hellos += [make_hello(name, Role.PREFILL) for name in ("p0", "p1")]
    members = [membership.admit(hello, 0.0) for hello in hellos]
    shape = RequestShape(num_prompt_tokens=20, max_tokens=14)
    now_s = 0.0
    for sequence, (kind, number) in enumerate(events, start=1):
        member, attempt = members[number], AttemptId(RequestId(str(number)), 1)
        if kind == "report":
            load = make_load(sequence=sequence, num_running=number, is_draining=number == 3)
            membership.hear(member, load, now_s)
        elif kind == "assign" and ledger.is_empty:
            pair = {"decode": hellos[number % 2].worker_id, "reader": hellos[3].worker_id}
            ledger.assign(attempt, shape, **pair, block_size=16)
        elif kind == "hear":
            ledger.hear(attempt, 1)
        elif kind == "release":
            ledger.release(attempt)
        elif kind in ("link", "unlink"):
            member.link = open_link(member) if kind == "link" else None
        elif kind == "admit":
            members[number] = membership.admit(hellos[number], now_s)
        elif kind == "dismiss":
            membership.dismiss(member)
        now_s += 0.8 if kind == "pass" else 0.0
        shown = membership.view(now_s)
        assert shown == membership.view(now_s)
        for each in members:
            each.view = None  # so that all of them are made anew
        assert shown == membership.view(now_s)


def test_coefficients_are_all_checked() -> None:
    membership = make_membership()
    for name in StepCoefficients.__dataclass_fields__:
        bad = replace(COEFFICIENTS, **{name: float("inf")})
        with pytest.raises(PeerFault):
            membership.admit(make_hello("d0", coefficients=bad), 0.0)
