import pytest

from pdserve.config.processes import SloClass
from pdserve.domain.errors import BadRequest
from router.in_flight import Outcome
from router.slo import Seen, SloBook, SloResult, judge

CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1)
BATCH = SloClass(name="batch", ttft_s=30.0, tpot_s=1.0, attainment=0.5)


def seen(ttft_s: float | None = None, tpot_s: float | None = None, total_s: float = 9.0) -> Seen:
    return Seen(total_s=total_s, ttft_s=ttft_s, tpot_s=tpot_s)


@pytest.mark.parametrize(
    ("got", "result"),
    [
        (seen(1.0, 0.1), SloResult.MET),
        (seen(1.0, None), SloResult.MET),  # one token: no gap to judge
        (seen(1.01, 0.1), SloResult.MISSED_TTFT),
        (seen(1.0, 0.11), SloResult.MISSED_TPOT),
        (seen(1.01, 0.11), SloResult.MISSED_BOTH),
    ],
)
def test_completed_request_is_judged_by_both_promises(got: Seen, result: SloResult) -> None:
    assert judge(CHAT, Outcome.COMPLETED, got) is result


def test_failed_and_refused_requests_miss_whatever_was_sent() -> None:
    assert judge(CHAT, Outcome.FAILED, seen(0.1, 0.01)) is SloResult.FAILED
    assert judge(CHAT, Outcome.REFUSED, seen(total_s=0.0)) is SloResult.REFUSED


def test_request_that_the_client_gave_up_counts_only_if_it_had_waited_too_long() -> None:
    assert judge(CHAT, Outcome.CANCELLED, seen(total_s=0.9)) is None
    assert judge(CHAT, Outcome.CANCELLED, seen(0.2, 0.01, total_s=5.0)) is None
    assert judge(CHAT, Outcome.CANCELLED, seen(total_s=1.1)) is SloResult.MISSED_TTFT


def test_attainment_is_the_share_of_judged_requests_that_met_both() -> None:
    book = SloBook((CHAT, BATCH))
    assert book.states()[0].attainment is None
    for got in (seen(0.5, 0.05), seen(0.5, 0.05), seen(2.0, 0.05), seen(2.0, 0.5)):
        book.count(CHAT, Outcome.COMPLETED, got)
    book.count(CHAT, Outcome.REFUSED, seen())
    book.count(CHAT, Outcome.CANCELLED, seen(total_s=0.1))
    chat, batch = book.states()
    assert (chat.num_met, chat.num_missed_ttft, chat.num_missed_both) == (2, 1, 1)
    assert (chat.num_refused, chat.num_judged) == (1, 5)
    assert chat.attainment == pytest.approx(0.4)
    assert batch.num_judged == 0


def test_empty_name_is_the_first_class() -> None:
    book = SloBook((CHAT, BATCH))
    assert book.find("") is CHAT
    assert book.find("batch") is BATCH
    assert SloBook().find("") is None


def test_unknown_class_is_refused_with_the_known_ones_and_without_repeating_it() -> None:
    with pytest.raises(BadRequest) as caught:
        SloBook((CHAT, BATCH)).find("my secret")
    assert "chat, batch" in caught.value.message
    assert "secret" not in caught.value.message
    with pytest.raises(BadRequest, match="no classes are set here"):
        SloBook().find("chat")
