"""What a plan's simulation predicts is what its cluster does: who reads and writes what, and when.

The cluster is the real router with the real workers, on virtual time; see
`tests.support.timed_cluster`. Messages take no time there, so that only steps count, and the two
agree but for the clock's whole nanoseconds, request by request, while no two prompts are read to
their end in one step. If some are, their KV lands in one moment, and who of them joins the batch
first is not the simulation's to say: then the means agree.
"""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml

from deploy.deployment import Deployment
from deploy.opening import read_deployment
from deploy.simulated.virtual_time import run_virtual
from placement.plan import Plan, PlanPool
from placement.simulation.pdserve_rules import PdserveCluster
from placement.simulation.timing import StepTiming
from placement.simulation.trace import Times, Trace
from placement.simulation.values import Link, PdserveOptions, Pool
from tests.support.plans import plan, pool
from tests.support.timed_cluster import Ask, Outcome, open_timed_cluster
from tests.support.worker_pair import BLOCK_SIZE

STEP_TOKENS = 64
TOLERANCE_S = 1e-6
FAST = {
    "fixed_s": 0.0041,
    "prefill_token_s": 1.3e-4,
    "prefill_attention_s": 2.1e-8,
    "decode_token_s": 3.7e-4,
    "decode_context_token_s": 1.9e-7,
}
SLOW = {name: 1.7 * value for name, value in FAST.items()}
READERS = {**FAST, "fixed_s": 0.0029}
PREFILL, DECODE = ("prefill", 2, READERS), ("decode", 2, FAST)
COLOCATED = ("colocated", 2, SLOW)


def deployment_of(
    tmp_path: Path, pools: list[Any], *, kv_tokens: int = 40_000, **limits: Any
) -> Deployment:
    """A plan's deployment, as `pdserve up --engine timed` makes it."""
    data = plan(
        block_size=BLOCK_SIZE,
        pools=[
            pool(role, replicas, kv_tokens=kv_tokens, step_times=times)
            for role, replicas, times in pools
        ],
    )
    no_rate = {"max_rate": 0.0}  # these requests come faster than those of the plan
    sizes = {"max_step_tokens": STEP_TOKENS, "max_num_requests": 6}
    data["limits"] |= {**no_rate, **sizes, **limits}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return read_deployment(path, {"engine": "timed", "prefix_reuse": False}, [])


def simulated(made: Plan, asks: list[Ask]) -> Times:
    limits = made.limits
    options = PdserveOptions(
        max_step_tokens=limits.max_step_tokens,
        max_num_requests=limits.max_num_requests,
        max_num_waiting=limits.max_num_waiting,
        max_wait_s=limits.max_wait_s,
        block_size=made.block_size,
        handoff_s=0.0,
    )
    trace = Trace(
        arrival_s=np.array([ask.at_s for ask in asks]),
        prompts=np.array([ask.num_prompt_tokens for ask in asks]),
        outputs=np.array([ask.num_output_tokens for ask in asks]),
    )
    return PdserveCluster([_simulated_pool(each) for each in made.pools], options).run(trace)


def _simulated_pool(each: PlanPool) -> Pool:
    assert each.step_times is not None
    return Pool(
        role=each.role,
        replicas=each.replicas,
        timing=StepTiming.of_coefficients(each.step_times.to_coefficients()),
        kv_tokens=each.kv_tokens,
        link=Link(bytes_per_s=1e18),
    )


def draw(seed: int, num: int, *, gap_s: float, least_prompt: int) -> list[Ask]:
    """Prompts of more than `STEP_TOKENS` tokens: no two of them end in one step."""
    rng, now_s, asks = Random(seed), 0.0, []
    for _ in range(num):
        now_s += rng.expovariate(1 / gap_s)
        prompt, answer = rng.randint(least_prompt, 400), rng.randint(1, 40)
        # The router counts the last token's position, which the decode worker does not need.
        answer += (prompt + answer) % BLOCK_SIZE == 1
        asks.append(Ask(at_s=now_s, num_prompt_tokens=prompt, num_output_tokens=answer))
    return asks


async def served(deployment: Deployment, asks: list[Ask]) -> list[Outcome]:
    async with open_timed_cluster(deployment) as cluster:
        return await cluster.run(asks)


def names(deployment: Deployment, numbers: Any) -> list[str]:
    """Workers by the number that the simulator gives them; -1 is nobody."""
    known = [worker.name for worker in deployment.workers]
    return [known[number] if number >= 0 else "" for number in numbers]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("pools", "limits"),
    [
        pytest.param([PREFILL, DECODE, COLOCATED], {}, id="mixed"),
        pytest.param([COLOCATED, PREFILL, DECODE], {"max_wait_s": 0.05}, id="mixed, short waits"),
        pytest.param([PREFILL, DECODE, COLOCATED], {"max_num_waiting": 6}, id="mixed, few waiting"),
        pytest.param([PREFILL, DECODE, COLOCATED], {"kv_tokens": 1_000}, id="mixed, little memory"),
        pytest.param([PREFILL, DECODE], {}, id="disaggregated"),
        pytest.param([COLOCATED], {}, id="colocated"),
    ],
)
def test_cluster_does_what_the_simulation_of_its_plan_predicts(
    tmp_path: Path, pools: list[Any], limits: dict[str, Any], seed: int
) -> None:
    deployment = deployment_of(tmp_path, pools, **limits)
    assert deployment.plan is not None
    num_workers = len(deployment.workers)
    asks = draw(seed, 120, gap_s=0.1 / num_workers, least_prompt=STEP_TOKENS + 1)
    expected = simulated(deployment.plan, asks)
    outcomes = run_virtual(served(deployment, asks))
    assert [each.reader for each in outcomes] == names(deployment, expected.prefill)
    is_decoded = [ask.num_output_tokens > 1 for ask in asks]
    assert [
        outcome.writer if more else "" for outcome, more in zip(outcomes, is_decoded, strict=True)
    ] == names(deployment, expected.decode)
    ttft_s = np.array([each.ttft_s for each in outcomes])
    total_s = np.array([each.total_s for each in outcomes])
    np.testing.assert_allclose(ttft_s, expected.ttft_s, rtol=0, atol=TOLERANCE_S)
    np.testing.assert_allclose(total_s, expected.e2e_s, rtol=0, atol=TOLERANCE_S)
    assert np.isfinite(ttft_s).sum() > 30
    if {"max_wait_s", "max_num_waiting"} & set(limits):
        assert np.isinf(ttft_s).any()


@pytest.mark.parametrize("seed", range(3))
def test_colocated_workers_read_all_they_write_and_nothing_else(tmp_path: Path, seed: int) -> None:
    deployment = deployment_of(tmp_path, [PREFILL, DECODE, COLOCATED], max_wait_s=5.0)
    asks = draw(seed, 150, gap_s=0.012, least_prompt=1)
    assert deployment.plan is not None
    expected = simulated(deployment.plan, asks)
    outcomes = run_virtual(served(deployment, asks))
    colocated = {worker.name for worker in deployment.workers if worker.settings.reads == "own"}
    assert len(colocated) == 2
    for outcome in outcomes:
        assert (outcome.reader in colocated) == (outcome.writer in colocated)
        if outcome.writer in colocated:
            assert outcome.reader == outcome.writer
    share = np.mean([outcome.reader in colocated for outcome in outcomes])
    predicted = np.isin(names(deployment, expected.prefill), list(colocated)).mean()
    assert 0.1 < share < 0.9
    assert share == pytest.approx(predicted, abs=0.05)
    for seen, wanted in (
        ([outcome.ttft_s for outcome in outcomes], expected.ttft_s),
        ([outcome.total_s for outcome in outcomes], expected.e2e_s),
    ):
        assert np.mean(seen) == pytest.approx(np.mean(wanted), rel=0.05)
