"""The table of requests in flight."""

import pytest

from pdserve.domain.errors import BadRequest, Reason, Refused
from router.in_flight import InFlight, Outcome


def test_label_is_free_again_once_its_request_ends() -> None:
    table = InFlight(max_num_requests=2)
    table.enter("a", 0.0)
    with pytest.raises(BadRequest) as caught:
        table.enter("a", 1.0)
    assert caught.value.reason is Reason.DUPLICATE_ID
    table.leave("a", Outcome.COMPLETED, 2.0)
    table.enter("a", 3.0)
    assert len(table) == 1


def test_too_many_are_refused_with_the_time_until_a_place_is_free() -> None:
    table = InFlight(max_num_requests=2)
    for _ in range(200):  # requests take 8 s
        table.enter("a", 0.0)
        table.leave("a", Outcome.COMPLETED, 8.0)
    table.enter("a", 0.0)
    table.enter("b", 0.0)
    with pytest.raises(Refused) as caught:
        table.enter("c", 0.0)
    assert caught.value.reason is Reason.OVERLOADED
    assert caught.value.retry_after_s == pytest.approx(4.0)  # two in flight: one ends every 4 s
    assert "2" in caught.value.message
    assert len(table) == 2


def test_draining_table_takes_nothing_new() -> None:
    table = InFlight(max_num_requests=2)
    table.enter("a", 0.0)
    table.is_draining = True
    with pytest.raises(Refused) as caught:
        table.enter("b", 0.0)
    assert caught.value.reason is Reason.DRAINING
    assert 0 < caught.value.retry_after_s <= 0.1


def test_every_end_is_counted_once() -> None:
    table = InFlight(max_num_requests=1)
    for outcome in Outcome:
        table.enter("a", 0.0)
        table.leave("a", outcome, 1.0)
    table.enter("a", 0.0)
    with pytest.raises(Refused):
        table.enter("b", 0.0)
    assert [table.counts[outcome] for outcome in Outcome] == [1, 1, 1, 2]
