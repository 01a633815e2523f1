import math
from dataclasses import replace

import pytest

from pdserve.client.statistics import RequestRecord, Slo, percentile, phase_shares, summarise
from pdserve.domain.tokens import PhaseTimeline

NO_SLO = Slo()


def record(index: int, ttft_s: float, tpot_s: float | None = 0.01) -> RequestRecord:
    return RequestRecord(
        index=index,
        arrival_s=float(index),
        prompt_tokens=10,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        e2e_s=ttft_s * 2,
        output_tokens=4,
    )


def failed(index: int, reason: str) -> RequestRecord:
    return replace(record(index, 9.0), failure=reason, output_tokens=1)


def test_percentiles_computed_by_hand() -> None:
    # Ranks 0..3 over [10, 20, 30, 40]: p50 is rank 1.5, p90 rank 2.7, p99 rank 2.97.
    values = [40.0, 10.0, 30.0, 20.0]
    assert percentile(values, 0) == 10.0
    assert percentile(values, 50) == 25.0
    assert percentile(values, 90) == pytest.approx(37.0)
    assert percentile(values, 99) == pytest.approx(39.7)
    assert percentile(values, 100) == 40.0
    assert percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))


def test_attainment_counts_failed_requests_and_goodput_only_good_ones() -> None:
    records = [record(0, 0.1), record(1, 0.2), record(2, 0.9), failed(3, "OVERLOADED")]
    report = summarise(records, Slo(ttft_s=0.5), 10.0)
    assert report.num_requests == 4
    assert report.num_ok == 3
    assert report.attainment == 0.5
    assert report.goodput == pytest.approx(0.2)
    assert report.requests_per_s == pytest.approx(0.3)
    assert report.output_tokens_per_s == pytest.approx(1.2)
    assert report.ttft_s[50] == 0.2  # of the three that ended well
    assert report.e2e_s[50] == 0.4


def test_both_objectives_must_be_met_and_one_token_has_no_gap_to_judge() -> None:
    slo = Slo(ttft_s=0.5, tpot_s=0.05)
    assert slo.is_met_by(record(0, 0.5, 0.05))
    assert not slo.is_met_by(record(0, 0.5, 0.06))
    assert not slo.is_met_by(record(0, 0.6, 0.05))
    assert slo.is_met_by(record(0, 0.5, None))
    assert not slo.is_met_by(failed(0, "WORKER_LOST"))


def test_failures_are_counted_by_reason_most_frequent_first() -> None:
    records = [failed(0, "DEADLINE"), failed(1, "OVERLOADED"), failed(2, "OVERLOADED")]
    report = summarise(records, NO_SLO, 1.0)
    assert list(report.failures.items()) == [("OVERLOADED", 2), ("DEADLINE", 1)]
    assert math.isnan(report.ttft_s[50])
    assert report.attainment == 0.0


def test_phase_shares_are_weighed_by_time_and_sum_to_one() -> None:
    first = PhaseTimeline(prefill_s=1.0, handoff_wait_s=0.5, decode_s=2.0, total_s=4.0)
    second = PhaseTimeline(prefill_s=3.0, transfer_s=2.5, decode_s=3.0, total_s=6.0)
    shares = phase_shares([first, second])
    assert shares["prefill_s"] == pytest.approx(0.4)
    assert shares["handoff_wait_s"] == pytest.approx(0.05)
    assert shares["decode_s"] == pytest.approx(0.5)
    assert shares["other_s"] == pytest.approx(0.05)  # 0.5 s of 10 that no phase claims
    assert sum(shares.values()) == pytest.approx(1.0)
    assert "transfer_s" not in shares  # it overlaps prefill


def test_phases_that_exceed_the_total_still_sum_to_one() -> None:
    shares = phase_shares([PhaseTimeline(prefill_s=2.0, decode_s=2.0, total_s=3.9)])
    assert sum(shares.values()) == pytest.approx(1.0)
    assert set(phase_shares([]).values()) == {0.0}


def test_report_takes_handoff_and_transfer_from_the_timelines() -> None:
    timeline = PhaseTimeline(
        prefill_s=0.6,
        transfer_s=0.3,
        handoff_wait_s=0.1,
        decode_s=0.3,
        total_s=1.0,
        prefill_worker="prefill-0",
        transferred_bytes=100,
    )
    local = PhaseTimeline(prefill_s=1.0, total_s=1.0)  # read by the decode worker itself
    records = [replace(record(0, 0.1), timeline=timeline), replace(record(1, 0.1), timeline=local)]
    report = summarise(records, NO_SLO, 1.0)
    assert report.handoff_share == pytest.approx(0.05)
    assert report.transfer_s[50] == pytest.approx(0.3)
    assert report.transferred_bytes == 100
