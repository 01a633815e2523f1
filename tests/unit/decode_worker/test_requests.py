"""Where a request's time went."""

import pytest

from decode_worker.requests import PhaseClock


def test_phases_are_differences_of_readings() -> None:
    times = PhaseClock(
        received_s=100.0,
        reserved_s=100.5,
        first_read_s=101.0,
        first_token_s=101.5,
        landed_s=102.25,
        joined_s=102.25,
        first_step_s=102.5,
        ended_s=105.0,
        prefill_queue_s=0.125,
        prefill_s=0.75,
        prefill_worker="p",
        transferred_bytes=7,
    )
    timeline = times.timeline("d")
    assert timeline.reserve_s == pytest.approx(0.5)
    assert timeline.transfer_s == pytest.approx(1.25)
    assert timeline.handoff_wait_s == pytest.approx(0.75)
    assert timeline.decode_queue_s == pytest.approx(0.25)
    assert timeline.decode_s == pytest.approx(2.5)
    assert timeline.ttft_s == pytest.approx(1.5)
    assert timeline.total_s == pytest.approx(5.0)
    assert (timeline.prefill_queue_s, timeline.prefill_s) == (0.125, 0.75)
    assert (timeline.prefill_worker, timeline.decode_worker) == ("p", "d")
    assert timeline.transferred_bytes == 7


def test_phase_that_was_never_reached_took_no_time() -> None:
    timeline = PhaseClock(received_s=100.0, first_token_s=101.0, ended_s=101.0).timeline("d")
    assert (timeline.transfer_s, timeline.decode_s, timeline.handoff_wait_s) == (0.0, 0.0, 0.0)
    assert timeline.total_s == pytest.approx(1.0)


def test_blocks_that_land_before_the_first_token_are_not_waited_for() -> None:
    times = PhaseClock(received_s=100.0, first_token_s=103.0, landed_s=102.0)
    assert times.timeline("d").handoff_wait_s == 0.0
