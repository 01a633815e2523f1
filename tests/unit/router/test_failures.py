"""What a worker's failure means for the request, the next attempt and the client."""

import pytest

from pdserve.domain.errors import (
    BadRequest,
    LocalFault,
    PdserveError,
    PeerFault,
    Reason,
    Refused,
    WorkerLost,
)
from pdserve.domain.messages import Role
from pdserve.domain.tokens import Failed
from router.cluster_view import Life, WorkerView
from router.failures import (
    blamed_lives,
    error_of,
    interrupted,
    interrupted_by_drain,
    no_workers,
    outcome_of,
    shown_to_client,
    slow_consumer,
)
from router.in_flight import Outcome
from router.policy import Pair
from tests.unit.router.builders import make_worker

SECRET = "words of a prompt"
TRIED_ELSEWHERE = {
    *(Reason.WORKER_LOST, Reason.TRANSFER_FAILED, Reason.NO_WORKERS, Reason.DRAINING),
    *(Reason.INCOMPATIBLE_PEER, Reason.FENCED, Reason.CANCELLED),
}
ANSWERED: dict[Reason, type[PdserveError]] = {
    Reason.INVALID_FIELD: BadRequest,
    Reason.CONTEXT_TOO_LONG: BadRequest,
    Reason.OVERLOADED: Refused,
    Reason.QUEUE_TIMEOUT: Refused,
    Reason.DEADLINE: PdserveError,
    Reason.SLOW_CONSUMER: PdserveError,
    Reason.KV_INTEGRITY: PdserveError,
    Reason.UNUSABLE_LOGITS: PdserveError,
}


def pair_of(*readers: str) -> Pair:
    targets: tuple[WorkerView, ...] = tuple(make_worker(name, Role.PREFILL) for name in readers)
    return Pair(decode=make_worker("d0"), prefill_targets=targets)


def names(lives: set[Life]) -> set[str]:
    return {life.worker_id for life in lives}


@pytest.mark.parametrize("reason", Reason)
def test_each_failure_of_a_worker_is_tried_elsewhere_answered_or_internal(reason: Reason) -> None:
    error = error_of(Failed(reason=reason, message=SECRET, retry_after_s=2.5))
    if reason in TRIED_ELSEWHERE:
        assert type(error) is PeerFault
        assert (error.reason, error.message) == (reason, SECRET)
    elif reason in ANSWERED:
        assert type(error) is ANSWERED[reason]
        assert (error.reason, error.message) == (reason, SECRET)
        assert error.retry_after_s == (2.5 if isinstance(error, Refused) else 0.0)
    else:
        assert isinstance(error, LocalFault)
        assert (error.reason, error.message) == (Reason.INTERNAL, "internal error at a worker")


@pytest.mark.parametrize(
    ("fault", "blamed"),
    [
        (WorkerLost("gone"), {"d0"}),
        (PeerFault("full", reason=Reason.DRAINING), {"d0"}),
        (PeerFault("old", reason=Reason.FENCED), {"d0"}),
        (PeerFault("ended", reason=Reason.CANCELLED), {"d0"}),
        (PeerFault("its peer", reason=Reason.WORKER_LOST), {"p0", "p1"}),
        (PeerFault("its peers", reason=Reason.TRANSFER_FAILED), {"p0", "p1"}),
        (PeerFault("its peers", reason=Reason.INCOMPATIBLE_PEER), {"p0", "p1"}),
    ],
)
def test_the_next_attempt_leaves_out_whom_the_fault_is_of(
    fault: PeerFault, blamed: set[str]
) -> None:
    assert names(blamed_lives(fault, pair_of("p0", "p1"))) == blamed
    assert names(blamed_lives(fault, pair_of())) == {"d0"}, "nobody else had a part in it"


@pytest.mark.parametrize("reason", sorted(TRIED_ELSEWHERE))
def test_client_sees_lost_workers_and_transfers_by_name_and_no_other_failure_of_workers(
    reason: Reason,
) -> None:
    shown = shown_to_client(PeerFault("why", reason=reason))
    known = reason is Reason.TRANSFER_FAILED
    assert shown.reason is (Reason.TRANSFER_FAILED if known else Reason.WORKER_LOST)
    assert shown.message == "why"
    assert shown.retry_after_s > 0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (PdserveError("c", reason=Reason.CANCELLED), Outcome.CANCELLED),
        (BadRequest("b"), Outcome.REFUSED),
        (Refused("r"), Outcome.REFUSED),
        (no_workers(), Outcome.REFUSED),
        (PdserveError("d", reason=Reason.DEADLINE), Outcome.FAILED),
        (WorkerLost("w"), Outcome.FAILED),
        (LocalFault("l"), Outcome.FAILED),
        (interrupted(3), Outcome.FAILED),
    ],
)
def test_refusals_and_cancellations_are_no_failures(error: PdserveError, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome


def test_ends_in_the_middle_of_an_answer_say_how_much_came() -> None:
    assert interrupted(7).reason is Reason.STREAM_INTERRUPTED
    assert "after 7 tokens" in interrupted(7).message
    assert "more than 9 tokens" in slow_consumer(9).message
    assert slow_consumer(9).reason is Reason.SLOW_CONSUMER


def test_drain_sends_elsewhere_who_has_nothing_yet_and_interrupts_the_others() -> None:
    unsent, part = interrupted_by_drain(0), interrupted_by_drain(4)
    assert unsent.reason is Reason.DRAINING
    assert 0 < unsent.retry_after_s < no_workers().retry_after_s
    assert part.reason is Reason.STREAM_INTERRUPTED
    assert "after 4 tokens" in part.message
