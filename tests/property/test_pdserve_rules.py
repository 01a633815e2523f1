"""Rules pdserve against plain workers that step one by one, and what holds for any cluster."""

from typing import get_args

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.domain.latency import StepCoefficients
from pdserve.domain.pair_cost import PolicyName
from placement.simulation.pdserve_rules import PdserveCluster
from placement.simulation.timing import StepTiming
from placement.simulation.trace import Trace
from placement.simulation.values import Link, PdserveOptions, Pool, PoolRole
from router.policy import POLICIES
from tests.support.plain_workers import PlainCluster, PlainRequest, PlainWorker

BLOCK_SIZE = 16
BYTES_PER_TOKEN = 1000.0


@st.composite
def pools(draw: st.DrawFn) -> list[Pool]:
    pair = [PoolRole.PREFILL, PoolRole.DECODE]
    kinds = ([PoolRole.COLOCATED], pair, [*pair, PoolRole.COLOCATED])
    roles = draw(st.sampled_from(kinds))
    kv_tokens = draw(st.sampled_from((1_200, 5_000, 1_000_000)))
    # Odd numbers, so that two events never share a moment by accident.
    return [
        Pool(
            role=role,
            replicas=draw(st.integers(1, 3)),
            pp=draw(st.sampled_from((1, 1, 2, 4))),
            timing=StepTiming.of_coefficients(
                StepCoefficients(
                    fixed_s=draw(st.floats(0.003, 0.03)) + 1e-6 * number,
                    prefill_token_s=1.37e-4,
                    prefill_attention_s=2.3e-9,
                    decode_token_s=draw(st.sampled_from((1.1e-4, 1.9e-3))),
                    decode_context_token_s=1.3e-7,
                )
            ),
            kv_tokens=kv_tokens,
            kv_bytes_per_token=BYTES_PER_TOKEN,
            link=Link(bytes_per_s=draw(st.sampled_from((1.1e6, 1.3e8)))),
        )
        for number, role in enumerate(roles)
    ]


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num = draw(st.sampled_from((1, 5, 60)))
    gap_s = draw(st.sampled_from((0.001, 0.05, 0.5)))
    return Trace(
        arrival_s=np.cumsum(rng.exponential(gap_s, num)),
        prompts=rng.integers(1, draw(st.sampled_from((20, 900))) + 1, num),
        outputs=rng.integers(1, draw(st.sampled_from((1, 5, 200))) + 1, num),
    )


options = st.builds(
    PdserveOptions,
    max_step_tokens=st.sampled_from((64, 300, 2_000)),
    max_num_requests=st.sampled_from((1, 4, 64)),
    block_size=st.just(BLOCK_SIZE),
    policy=st.sampled_from(get_args(PolicyName)),
    max_num_waiting=st.sampled_from((0, 0, 3, 20)),
    max_wait_s=st.sampled_from((0.0, 0.0, 0.02, 0.3)),
)


def plain_times(
    given_pools: list[Pool], trace: Trace, limits: PdserveOptions, concurrency: int | None
) -> list[PlainRequest]:
    workers: list[PlainWorker] = []
    for pool in given_pools:
        timing = pool.timing
        assert isinstance(timing, StepTiming)
        coefficients = StepCoefficients(
            fixed_s=timing.shared_s,
            prefill_token_s=float(np.diff(timing.prefill_s)[0]),
            prefill_attention_s=float(timing.pair_s[0]),
            decode_token_s=float(np.diff(timing.decode_s)[0]),
            decode_context_token_s=float(timing.context_s[0]),
        )
        workers += [
            PlainWorker(
                number=len(workers) + copy,
                reads=pool.role != PoolRole.DECODE,
                writes=pool.role != PoolRole.PREFILL,
                coefficients=coefficients,
                num_free=pool.kv_tokens // BLOCK_SIZE,
                max_step_tokens=limits.max_step_tokens,
                max_num_requests=limits.max_num_requests,
                seconds_per_token=BYTES_PER_TOKEN / pool.link.bytes_per_s,
                depth=pool.pp,
            )
            for copy in range(pool.replicas)
        ]
    requests = [
        PlainRequest(number, int(prompt), int(output), 0.0 if concurrency else float(arrival))
        for number, (prompt, output, arrival) in enumerate(
            zip(trace.prompts, trace.outputs, trace.arrival_s, strict=True)
        )
    ]
    cluster = PlainCluster(
        workers,
        BLOCK_SIZE,
        policy=POLICIES[limits.policy],
        max_num_waiting=limits.max_num_waiting,
        max_wait_s=limits.max_wait_s,
    )
    cluster.run(requests, concurrency)
    assert cluster.ledger.is_empty
    return requests


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(given_pools=pools(), trace=traces(), limits=options, loop=st.sampled_from((None, None, 7)))
def test_pdserve_rules_equal_plain_workers(
    given_pools: list[Pool], trace: Trace, limits: PdserveOptions, loop: int | None
) -> None:
    times = PdserveCluster(given_pools, limits).run(trace, concurrency=loop)
    requests = plain_times(given_pools, trace, limits, loop)
    arrival_s = np.array([request.arrival_s for request in requests])
    is_refused = np.array([request.writer is None for request in requests])
    np.testing.assert_allclose(times.arrival_s, arrival_s, rtol=0, atol=1e-8)
    assert np.isinf(times.e2e_s).tolist() == is_refused.tolist()
    first_s = np.array([request.first_s for request in requests])[~is_refused]
    end_s = np.maximum(np.array([request.end_s for request in requests])[~is_refused], first_s)
    ttft_s, e2e_s = times.ttft_s[~is_refused], times.e2e_s[~is_refused]
    np.testing.assert_allclose(arrival_s[~is_refused] + ttft_s, first_s, rtol=0, atol=1e-8)
    np.testing.assert_allclose(arrival_s[~is_refused] + e2e_s, end_s, rtol=0, atol=1e-8)
    readers = [request.reader.number if request.reader else -1 for request in requests]
    assert times.prefill.tolist() == readers
