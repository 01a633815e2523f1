"""The numbers behind a report's figures."""

import numpy as np
import pytest

from pdserve.domain.latency import StepCoefficients
from placement.demand import Workload
from placement.report_parts.curves import (
    Candidate,
    attainment_curve,
    cheapest_at,
    replay_hour,
    trade_offs,
)
from placement.simulate import simulate
from placement.simulation.summary import summarise
from placement.simulation.timing import StepTiming
from placement.simulation.values import Pool, PoolRole, SimulationConfig, TrafficClass

TIMING = StepTiming.of_coefficients(
    StepCoefficients(
        fixed_s=0.002,
        prefill_token_s=1e-4,
        prefill_attention_s=0.0,
        decode_token_s=5e-4,
        decode_context_token_s=0.0,
    )
)
SLO = TrafficClass(ttft_s=0.06, tpot_s=0.01, attainment=0.9)
NUM = 600


def config(num_prefill: int, slo: tuple[TrafficClass, ...] = (SLO,)) -> SimulationConfig:
    pools = (
        Pool(role=PoolRole.PREFILL, replicas=num_prefill, timing=TIMING),
        Pool(role=PoolRole.DECODE, replicas=2, timing=TIMING),
    )
    return SimulationConfig(pools=pools, slo=slo)


def workload() -> Workload:
    rng = np.random.default_rng(7)
    gaps = rng.exponential(1.0, NUM)
    gaps[0] = 0.0
    return Workload(
        prompt_tokens=rng.integers(50, 400, NUM),
        output_tokens=rng.integers(2, 40, NUM),
        unit_gaps=gaps,
    )


def candidates() -> list[Candidate]:
    return [
        Candidate(
            label=f"{num} : 2",
            config=config(num),
            usd_per_hour=2.0 * (num + 2),
            is_chosen=num == 2,
        )
        for num in (1, 2, 4)
    ]


def test_attainment_is_what_a_simulation_at_that_rate_says() -> None:
    curve = attainment_curve(config(2), workload(), 40.0, shares=(0.5, 1.0, 3.0))
    assert curve.rates == (20.0, 40.0, 120.0)
    at_plan = SimulationConfig(pools=config(2).pools, slo=(SLO,), rate=40.0)
    result = simulate(at_plan, workload())
    [summary] = summarise(at_plan, result, workload().output_tokens).classes
    [each] = curve.classes
    assert each.attainment[1] == pytest.approx(summary.attainment)
    assert (each.low[1], each.high[1]) == pytest.approx(summary.interval)
    assert each.attainment[0] > each.attainment[2]


def test_every_class_has_its_curve() -> None:
    slo = (
        TrafficClass(ttft_s=0.06, tpot_s=0.01, name="chat", share=0.5),
        TrafficClass(ttft_s=1.0, tpot_s=0.05, name="batch", share=0.5),
    )
    curve = attainment_curve(config(1, slo), workload(), 40.0, shares=(1.0,))
    chat, batch = curve.classes
    assert (chat.name, batch.name) == ("chat", "batch")
    assert batch.attainment[0] > chat.attainment[0]


def test_cost_grows_with_rate_until_nothing_is_enough() -> None:
    points = [cheapest_at(rate, candidates(), workload()) for rate in (5.0, 60.0, 500.0)]
    costs = [point.usd_per_hour for point in points]
    assert costs[0] == 6.0
    assert costs[1] is not None
    assert costs[1] > 6.0
    assert costs[2] is None
    mean_tokens = float((workload().prompt_tokens + workload().output_tokens).mean())
    assert points[0].usd_per_million_tokens == pytest.approx(6e6 / (3600 * 5 * mean_tokens))


def test_front_holds_what_no_other_design_beats_in_both() -> None:
    points = trade_offs(candidates(), workload(), 30.0)
    shown = [point for point in points if point.ttft_p90_s is not None]
    assert any(point.is_on_front for point in shown)
    for point in shown:
        assert point.ttft_p90_s is not None
        assert point.tpot_p90_s is not None
        beaten = any(
            other.ttft_p90_s is not None
            and other.tpot_p90_s is not None
            and other.ttft_p90_s < point.ttft_p90_s
            and other.tpot_p90_s < point.tpot_p90_s
            for other in shown
        )
        assert not (point.is_on_front and beaten)
    assert [point.is_chosen for point in points] == [False, True, False]


def test_overloaded_design_has_a_verdict_and_no_percentiles() -> None:
    [one, *_] = trade_offs(candidates(), workload(), 150.0)
    assert one.is_overloaded
    assert one.ttft_p90_s is None
    assert not one.is_on_front


def test_replay_counts_each_minute_of_arrivals() -> None:
    line = replay_hour(config(2), workload(), 2.0)
    arrival_s = np.cumsum(workload().gaps() / 2.0)
    in_second = np.sum((arrival_s >= 60) & (arrival_s < 120))
    assert line.rate[1] == pytest.approx(in_second / 60)
    assert line.start_s[:2] == (0.0, 60.0)
    assert len(line.start_s) == int(arrival_s[-1] // 60)
    assert all(share is None or 0 <= share <= 1 for share in line.attainment)


def test_replay_ends_after_an_hour() -> None:
    assert len(replay_hour(config(1), workload(), 0.1).start_s) == 60


def test_minute_without_arrivals_has_no_latency() -> None:
    sparse = Workload(
        prompt_tokens=np.array([100, 100]),
        output_tokens=np.array([4, 4]),
        arrival_s=np.array([0.0, 200.0]),
    )
    line = replay_hour(config(1), sparse, None)
    assert line.rate[1] == 0.0
    assert line.ttft_p90_s[1] is None
    assert line.attainment[1] is None
