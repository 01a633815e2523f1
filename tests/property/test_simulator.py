"""Closed forms against a step-by-step event loop written on its own, on random clusters."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement.simulation.distserve import DistserveCluster
from placement.simulation.timing import DistserveTiming
from placement.simulation.trace import Trace
from placement.simulation.values import Pool, PoolRole
from tests.support.event_loop import PeerRequest, run_event_loop

A_TICK_MS = 1e-6

TIMINGS = (
    DistserveTiming(
        prefill=(18.1, 0.1, 7.1e-6),
        decode_small=(19.9, 6.3e-4, 0.0385),
        decode_large=(7.2, 5.8e-4, 0.158),
        threshold=95,
        max_num_tokens=66_144,
    ),
    DistserveTiming(
        prefill=(14.7, 0.07, 2.4e-6),
        decode_small=(13.3, 3.4e-4, 0.063),
        decode_large=(10.6, 3.1e-4, 0.086),
        threshold=6,
        max_num_tokens=4_000,
    ),
)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Pool], bool]:
    """Pools of each role, or colocated ones; several of a role may differ."""
    is_colocated = draw(st.booleans())
    roles = [PoolRole.COLOCATED] if is_colocated else [PoolRole.PREFILL, PoolRole.DECODE]
    pools = [
        Pool(
            role=role,
            replicas=draw(st.integers(1, 3)),
            timing=draw(st.sampled_from(TIMINGS)),
            pp=draw(st.sampled_from((1, 1, 2, 3))),
        )
        for role in roles
        for _ in range(draw(st.integers(1, 2)))
    ]
    return pools, is_colocated


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Lengths, load and burstiness that reach idle, busy and overfull batches, with equal times."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num = draw(st.sampled_from((1, 2, 30, 120)))
    gap_s = draw(st.sampled_from((0.0, 0.002, 0.05, 0.5)))
    shape = draw(st.sampled_from((0.1, 1.0, 10.0)))
    prompts = draw(st.sampled_from(((1, 1), (1, 20), (1, 3_999), (2_000, 3_999))))
    outputs = draw(st.sampled_from(((0, 1), (0, 10), (0, 300), (200, 300))))
    gaps_s = rng.gamma(shape, gap_s / shape, num) if gap_s else np.zeros(num)
    return Trace(
        # Whole microseconds: equal times are equal in the peer's milliseconds, too.
        arrival_s=np.cumsum(gaps_s).round(6),
        prompts=rng.integers(prompts[0], prompts[1] + 1, num),
        outputs=rng.integers(outputs[0], outputs[1] + 1, num),
    )


def overfull(seed: int) -> tuple[list[Pool], bool, Trace]:
    """More decode tokens than a batch takes, so that requests take turns."""
    rng = np.random.default_rng(seed)
    decode = Pool(role=PoolRole.DECODE, replicas=1 + seed % 2, timing=TIMINGS[seed % 2])
    pools = [Pool(role=PoolRole.PREFILL, replicas=3, timing=TIMINGS[0]), decode]
    is_colocated = seed % 3 == 2
    if is_colocated:
        pools = [Pool(role=PoolRole.COLOCATED, replicas=1, timing=TIMINGS[0])]
    trace = Trace(
        arrival_s=np.cumsum(rng.exponential(0.1, 100)),
        prompts=rng.integers(1, 4_000, 100),
        outputs=rng.integers(0, 300, 100),
    )
    return pools, is_colocated, trace


def peer_times(pools: list[Pool], is_colocated: bool, trace: Trace) -> list[PeerRequest]:
    requests = [
        PeerRequest(number, int(prompt), int(output), float(arrival * 1e3))
        for number, (prompt, output, arrival) in enumerate(
            zip(trace.prompts, trace.outputs, trace.arrival_s, strict=True)
        )
    ]
    instances: dict[bool, list[tuple[DistserveTiming, int]]] = {True: [], False: []}
    for pool in pools:
        assert isinstance(pool.timing, DistserveTiming)
        instances[pool.role == PoolRole.DECODE] += [(pool.timing, pool.pp)] * pool.replicas
    run_event_loop(requests, instances[False], instances[True])
    return requests


@pytest.mark.parametrize("is_explicit", [False, True], ids=["closed-form", "explicit"])
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
@given(cluster=clusters(), trace=traces())
def test_distserve_rules_equal_a_plain_event_loop(
    is_explicit: bool, cluster: tuple[list[Pool], bool], trace: Trace
) -> None:
    assert_equals_the_event_loop(*cluster, trace, is_explicit)


@pytest.mark.parametrize("is_explicit", [False, True], ids=["closed-form", "explicit"])
@pytest.mark.parametrize("seed", range(6))
def test_overfull_decode_batches_take_turns_as_in_the_event_loop(
    seed: int, is_explicit: bool
) -> None:
    assert_equals_the_event_loop(*overfull(seed), is_explicit)


def assert_equals_the_event_loop(
    pools: list[Pool], is_colocated: bool, trace: Trace, is_explicit: bool
) -> None:
    times = DistserveCluster(pools).run(trace, is_explicit=is_explicit)
    requests = peer_times(pools, is_colocated, trace)
    ttft_ms = np.array([request.first_ms - request.arrival_ms for request in requests])
    e2e_ms = np.array([request.last_ms - request.arrival_ms for request in requests])
    np.testing.assert_allclose(times.ttft_s * 1e3, ttft_ms, rtol=0, atol=A_TICK_MS)
    np.testing.assert_allclose(times.e2e_s * 1e3, e2e_ms, rtol=0, atol=A_TICK_MS)
    assert times.prefill.tolist() == [request.prefill for request in requests]
    decodes = [request.decode for request in requests]
    assert times.decode.tolist() == decodes
