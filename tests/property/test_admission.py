"""The router turns away those whom the simulator of plans turns away."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.domain.errors import Reason, Refused
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.sampling import SamplingParams
from placement.simulation.pdserve_rules import PdserveCluster
from placement.simulation.timing import StepTiming
from placement.simulation.trace import Trace
from placement.simulation.values import PdserveOptions, Pool, PoolRole
from router.dispatch import DispatchLimits
from router.requests import Chunk, GenerateCall
from tests.unit.router.played_cluster import open_played_cluster, settle

BLOCK_SIZE = 16
NUM_BLOCKS = 60_000
NUM_OUTPUT = 8
STEP_TOKENS = 512
COEFFICIENTS = StepCoefficients(
    fixed_s=0.0071,
    prefill_token_s=1.3e-4,
    prefill_attention_s=0.0,
    decode_token_s=1.1e-3,
    decode_context_token_s=1e-7,
)


def simulated(prompts: Sequence[int], num_workers: int, limits: PdserveOptions) -> list[bool]:
    """Whether each of these, all sent at once, is refused."""
    pool = Pool(
        role=PoolRole.COLOCATED,
        replicas=num_workers,
        timing=StepTiming.of_coefficients(COEFFICIENTS),
        kv_tokens=NUM_BLOCKS * BLOCK_SIZE,
    )
    trace = Trace(
        arrival_s=np.linspace(0.0, 1e-6, len(prompts)),  # before any step is done
        prompts=np.array(prompts),
        outputs=np.full(len(prompts), NUM_OUTPUT),
    )
    times = PdserveCluster([pool], limits).run(trace)
    return [bool(refused) for refused in np.isinf(times.e2e_s)]


async def served(prompts: Sequence[int], num_workers: int, limits: PdserveOptions) -> list[bool]:
    """The same of the router, by workers that have not begun to answer."""
    names = [f"d{number}" for number in range(num_workers)]

    async def ignore(chunk: Chunk) -> None:
        return

    dispatch_limits = DispatchLimits(
        max_num_waiting=limits.max_num_waiting, max_wait_s=limits.max_wait_s
    )
    workers = {
        "coefficients": COEFFICIENTS,
        "num_blocks": NUM_BLOCKS,
        "max_context_tokens": 100_000,
        "max_num_requests": limits.max_num_requests,
        "max_step_tokens": limits.max_step_tokens,
    }
    async with open_played_cluster(
        *names, limits=dispatch_limits, hello_changes=workers
    ) as cluster:
        tasks = []
        for number, num_tokens in enumerate(prompts):
            call = GenerateCall(
                prompt=(1,) * num_tokens,
                sampling=SamplingParams(max_tokens=NUM_OUTPUT),
                label=f"r{number}",
            )
            tasks.append(asyncio.create_task(cluster.dispatcher.run(call, ignore)))
            await settle()
        refused = [task.done() for task in tasks]
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end, was_refused in zip(ends, refused, strict=True):
            if was_refused:
                assert isinstance(end, Refused)
                assert end.reason is Reason.OVERLOADED
        return refused


def options(**limits: Any) -> PdserveOptions:
    return PdserveOptions(
        max_step_tokens=STEP_TOKENS, max_num_requests=64, block_size=BLOCK_SIZE, **limits
    )


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 2_000), min_size=1, max_size=30),
    num_workers=st.integers(1, 3),
    max_num_waiting=st.sampled_from((0, 1, 3, 10)),
)
def test_router_and_simulator_refuse_the_same_requests_by_their_number(
    prompts: list[int], num_workers: int, max_num_waiting: int
) -> None:
    limits = options(max_num_waiting=max_num_waiting)
    expected = simulated(prompts, num_workers, limits)
    assert asyncio.run(served(prompts, num_workers, limits)) == expected


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 2_000), min_size=1, max_size=30),
    num_workers=st.integers(1, 3),
    max_wait_s=st.sampled_from((0.0, 0.02, 0.16, 0.3, 0.5)),
)
def test_router_and_simulator_refuse_the_same_requests_by_their_wait(
    prompts: list[int], num_workers: int, max_wait_s: float
) -> None:
    limits = options(max_wait_s=max_wait_s)
    expected = simulated(prompts, num_workers, limits)
    assert asyncio.run(served(prompts, num_workers, limits)) == expected


def test_both_limits_do_refuse() -> None:
    prompts = [900] * 12
    assert sum(simulated(prompts, 1, options(max_num_waiting=4))) == 8
    assert 0 < sum(simulated(prompts, 1, options(max_wait_s=0.3))) < 12
