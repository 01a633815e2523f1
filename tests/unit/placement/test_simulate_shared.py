"""Prefill and decode instances that share a host, under our own rules; times by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pdserve.domain.latency import StepCoefficients
from placement.simulate import Simulator
from placement.simulation.timing import StepTiming
from placement.simulation.trace import Times, Trace
from placement.simulation.values import Link, PdserveOptions, Pool, PoolRole, SimulationConfig

READ_S, STEP_S = 0.1, 0.01
"""A prompt of 100 tokens, and a decode step of any batch."""
TIMING = StepTiming.of_coefficients(
    StepCoefficients(
        fixed_s=STEP_S,
        prefill_token_s=(READ_S - STEP_S) / 100,
        prefill_attention_s=0.0,
        decode_token_s=0.0,
        decode_context_token_s=0.0,
    )
)


def run(
    *requests: tuple[float, int],
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    num_prefill: int = 1,
    prompts: Sequence[int] | None = None,
    **options: Any,
) -> Times:
    """Requests by arrival and tokens of the answer, prompts of 100; KV travels in no time."""
    pools = tuple(
        Pool(role=role, replicas=count, timing=TIMING, link=Link(bytes_per_s=1e15), **changes)
        for role, count, changes in (
            (PoolRole.PREFILL, num_prefill, prefill or {}),
            (PoolRole.DECODE, 1, decode or {}),
        )
    )
    config = SimulationConfig(pools=pools, pdserve=PdserveOptions(handoff_s=0.0, **options))
    arrivals, outputs = zip(*requests, strict=True)
    trace = Trace(
        arrival_s=np.array(arrivals, float),
        prompts=np.array(prompts or [100] * len(outputs)),
        outputs=np.array(outputs),
    )
    return Simulator(config).run(trace)


def test_prompt_beside_an_answer_takes_longer() -> None:
    times = run((0.0, 101), (0.5, 1), prefill={"beside": 1.5})
    assert times.ttft_s == pytest.approx([READ_S, 1.5 * READ_S])
    assert times.busy_s[0] == pytest.approx(2.5 * READ_S)


def test_prompt_goes_on_at_full_speed_once_the_answer_ends() -> None:
    # The answer is decoded until 0.6: 0.05 s of the second prompt's 0.1 s are done by then at half
    # the speed, from 0.5 on.
    times = run((0.0, 51), (0.5, 1), prefill={"beside": 2.0})
    assert times.ttft_s[1] == pytest.approx(0.1 + 0.05)
    assert times.busy_s[0] == pytest.approx(0.1 + 0.15)


def test_prompt_is_slowed_from_the_moment_at_which_an_answer_begins() -> None:
    # Two readers; the longer prompt has 0.09 s to go when the shorter one's answer begins.
    times = run((0.0, 101), (0.0, 1), prompts=[100, 200], num_prefill=2, prefill={"beside": 2.0})
    assert times.prefill.tolist() == [0, 1]
    assert times.ttft_s[1] == pytest.approx(0.1 + 2 * 0.09)


def test_answers_beside_a_prompt_take_longer_steps() -> None:
    alone, beside = run((0.0, 101)), run((0.0, 101), (0.5, 1), decode={"beside": 1.5})
    # Of its 100 steps those within the 0.1 s of the other prompt take half as long again; the step
    # under way when the prompt ends is finished as it began.
    extra_s = (beside.e2e_s[0] - alone.e2e_s[0]) / STEP_S
    assert 3.0 <= extra_s <= 4.0


def test_share_of_busy_readers_counts() -> None:
    # One of two readers: half of the slowdown.
    alone = run((0.0, 101))
    beside = run((0.0, 101), (0.5, 1), num_prefill=2, decode={"beside": 2.0})
    assert 3.0 <= (beside.e2e_s[0] - alone.e2e_s[0]) / STEP_S <= 4.0


def test_further_answers_slow_a_prompt_more() -> None:
    together = [(0.0, 101), (0.0, 101), (0.0, 101), (0.8, 1)]
    one = run((0.0, 101), (0.8, 1), prefill={"beside": 1.5, "beside_answer": 0.1})
    three = run(*together, prefill={"beside": 1.5, "beside_answer": 0.1})
    assert one.ttft_s[1] == pytest.approx(1.5 * READ_S)
    assert three.ttft_s[3] == pytest.approx(1.7 * READ_S)


def test_new_request_takes_time_from_those_under_way_only() -> None:
    alone = run((0.0, 101), decode={"stolen_s": 0.004})
    assert alone.e2e_s[0] == pytest.approx(READ_S + 100 * STEP_S)
    joined = run((0.0, 101), (0.5, 11), decode={"stolen_s": 0.004})
    # Half when it comes, half when its KV does.
    assert joined.e2e_s[0] == pytest.approx(alone.e2e_s[0] + 0.004)


def test_first_step_after_a_pause_takes_longer() -> None:
    times = run((0.0, 11), (0.12, 11), (1.0, 2), decode={"wake_s": 0.005})
    assert times.e2e_s[0] == pytest.approx(READ_S + 10 * STEP_S + 0.005)
    assert times.tpot_s[2] == pytest.approx(STEP_S + 0.005)


def test_handoff_takes_longer_where_the_decode_worker_is_busy() -> None:
    times = run((0.0, 101), (0.5, 11), busy_handoff_s=0.003)
    assert times.ttft_s == pytest.approx([READ_S, READ_S + 0.003])


def test_many_workers_that_slow_each_other_serve_all() -> None:
    rng = np.random.default_rng(0)
    requests = [
        (float(at), int(n))
        for at, n in zip(
            np.cumsum(rng.exponential(0.01, 3000)), rng.integers(1, 60, 3000), strict=True
        )
    ]
    slowed = {"beside": 1.3, "beside_answer": 0.02}
    times = run(*requests, num_prefill=9, prefill=slowed, decode={"beside": 1.3, "stolen_s": 1e-3})
    assert np.isfinite(times.e2e_s).all()
    assert (times.ttft_s >= READ_S - 1e-9).all()
    end_s = float((times.arrival_s + times.e2e_s).max())
    assert (times.busy_s <= end_s).all()


def test_scatter_spreads_answers_around_what_the_rules_say() -> None:
    requests = [(float(at), 21) for at in range(2000)]
    plain = run(*requests)
    spread = run(*requests, answer_scatter=0.1, step_scatter=0.3)
    factor = spread.tpot_s / plain.tpot_s
    assert factor.mean() == pytest.approx(1.0, abs=0.01)
    # Variances add; 20 steps level their own part out.
    assert factor.std() == pytest.approx((0.1**2 + 0.3**2 / 20) ** 0.5, rel=0.05)
    assert spread.ttft_s.tolist() == plain.ttft_s.tolist()
    assert spread.e2e_s - spread.ttft_s == pytest.approx(20 * spread.tpot_s)
    again = run(*requests, answer_scatter=0.1, step_scatter=0.3)
    assert again.tpot_s.tolist() == spread.tpot_s.tolist()


def test_prompt_is_read_only_once_its_decode_worker_has_a_place() -> None:
    # Our decode workers admit before they ask a prefill worker (`decode_worker.intake`).
    times = run((0.0, 101), (0.2, 11), max_num_requests=1)
    assert times.ttft_s[1] == pytest.approx(float(times.e2e_s[0]) - 0.2 + READ_S)
    assert run((0.0, 101), (0.2, 11), max_num_requests=2).ttft_s[1] == pytest.approx(READ_S)
