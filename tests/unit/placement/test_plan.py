"""`plan.yaml`: it round-trips, and refuses what it does not know."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pdserve.config.override import ModelOverride
from pdserve.domain.errors import LocalFault
from placement.demand import Workload
from placement.plan import Plan, format_plan, parse_plan, plan_of
from placement.search.bursts import burst_above
from placement.search.results import PlanResult
from placement.search.traffic import Traffic
from placement.simulate import Simulator
from placement.simulation.values import PdserveOptions, SimulationConfig, TrafficClass
from placement.solver import solve
from tests.support.plan_inputs import small_inputs

PREDICTION: dict[str, Any] = {
    "rate": 4.0,
    "goodput": 3.8,
    "goodput_per_gpu": 0.95,
    "attainment": 0.95,
    "attainment_interval": [0.93, 0.97],
    "ttft_s": {"p50": 0.1},
    "tpot_s": {"p50": 0.02},
    "usd_per_hour": 7.2,
    "usd_per_million_tokens": 0.4,
    "watts": 1600.0,
    "horizon_s": 600.0,
    "num_seeds": 5,
    "step_time_error": 0.05,
}
LIMITS: dict[str, Any] = {
    "max_step_tokens": 512,
    "max_num_requests": 64,
    "max_num_waiting": 8,
    "max_wait_s": 0.2,
    "max_rate": 4.0,
}


def data(**changes: Any) -> dict[str, Any]:
    pools = [{"role": "colocated", "gpu": "a100_sxm", "tp": 2, "replicas": 2}]
    plan = {"version": 1, "model": "m", "rules": "pdserve", "pools": pools}
    return {**plan, "limits": LIMITS, "prediction": PREDICTION, **changes}


pools: st.SearchStrategy[list[dict[str, Any]]] = st.lists(
    st.builds(
        dict,
        role=st.just("colocated"),
        gpu=st.sampled_from(["a100_sxm", "h100_sxm"]),
        tp=st.sampled_from([1, 2, 4, 8]),
        pp=st.integers(1, 4),
        replicas=st.integers(1, 1000),
        nodes=st.lists(st.sampled_from(["a100_sxm:0", "h100_sxm:12"]), max_size=3),
    ),
    min_size=1,
    max_size=4,
)


@given(pools=pools, cells=st.integers(1, 100), rate=st.floats(0.001, 1e6))
def test_written_plan_reads_back_equal(pools: list[Any], cells: int, rate: float) -> None:
    prediction = {**PREDICTION, "rate": rate}
    plan = parse_plan(data(pools=pools, cells=cells, prediction=prediction), source="x")
    assert parse_plan(yaml.safe_load(format_plan(plan)), source="y") == plan


def test_solved_plan_reads_back_equal() -> None:
    override = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    ours = {"policy": "least_requests", "block_size": 32}
    result = solve(small_inputs(override_config=override, pdserve=ours))
    assert isinstance(result, PlanResult)
    plan = plan_of(result)
    assert (plan.policy, plan.block_size) == ("least_requests", 32)
    assert plan.override_config == ModelOverride.model_validate(override)
    assert parse_plan(yaml.safe_load(format_plan(plan)), source="x") == plan
    assert plan.num_gpus == result.design.num_gpus
    assert plan.limits.max_num_requests == result.design.max_num_requests
    assert sum(len(pool.nodes) for pool in plan.pools) == result.design.num_workers


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2 is not known here"),
        ({"pools": []}, "pools"),
        ({"pools": [{"role": "prefill", "gpu": "a", "tp": 1, "replicas": 1}]}, "needs prefill and"),
        ({"limit": {}}, "did you mean limits"),
        ({"policy": "best"}, "policy: Input should be 'least_total_time' or 'least_requests'"),
    ],
)
def test_bad_plan_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LocalFault) as caught:
        parse_plan(data(**changes), source="plan.yaml")
    assert words in caught.value.message


def test_plan_counts_its_cells() -> None:
    assert Plan.model_validate(data(cells=3)).num_gpus == 12


@pytest.mark.parametrize("ttft_s", [0.15, 0.4, 2.0])
def test_limits_refuse_nobody_for_whom_the_plan_was_made(ttft_s: float) -> None:
    result = solve(
        small_inputs(
            rules="pdserve",
            slo={"ttft_s": ttft_s, "tpot_s": 0.08},
            search={"duration_s": 120},
        )
    )
    assert isinstance(result, PlanResult)
    plan = plan_of(result)
    rng = np.random.default_rng(7)
    num = 3000
    workload = Workload(
        arrival_s=np.cumsum(rng.exponential(1 / plan.prediction.rate, num)),
        prompt_tokens=np.clip(rng.lognormal(6.06, 0.55, num), 1, 1800).astype(np.int64),
        output_tokens=np.clip(rng.lognormal(4.6, 0.55, num), 1, 600).astype(np.int64),
    )
    limits = PdserveOptions(
        max_num_waiting=plan.limits.max_num_waiting, max_wait_s=plan.limits.max_wait_s
    )
    config = result.design.config(SimulationConfig(pools=(), pdserve=limits))
    assert Simulator(config).run(workload.trace()).num_refused <= 0.01 * num
    assert plan.limits.max_burst is not None
    assert burst_above(workload.trace().arrival_s, plan.limits.max_rate) <= plan.limits.max_burst


def test_rate_limit_lets_in_the_bursts_of_the_trace_that_the_plan_was_made_with(
    tmp_path: Path,
) -> None:
    """Hours that are busy and hours that are not: chance alone would not run ahead so far."""
    num = 20_000
    gaps = np.random.default_rng(3).exponential(1.0, num)
    arrivals = np.cumsum(gaps * np.where(np.arange(num) % 10_000 < 5_000, 0.5, 1.5))
    rows = [f"{arrival:.3f},200,50" for arrival in arrivals]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(("arrival_s,prompt_tokens,output_tokens", *rows)))
    workload = {"trace": str(trace), "arrivals": "recorded"}
    result = solve(small_inputs(workload=workload, search={"duration_s": 2000, "seeds": 2}))
    assert isinstance(result, PlanResult)
    limits, at_rate = plan_of(result).limits, result.prediction
    assert limits.max_burst is not None
    unit = Workload(
        arrival_s=arrivals, prompt_tokens=np.full(num, 200), output_tokens=np.full(num, 50)
    )
    simulated = unit.head(round(at_rate.rate * at_rate.horizon_s)).trace(at_rate.rate)
    assert burst_above(simulated.arrival_s, limits.max_rate) <= limits.max_burst


def bursts(path: Path, *, num_bursts: int, size: int, gap_s: float) -> None:
    """`size` requests at once every `gap_s`; the gaps within a burst are a millisecond."""
    rng = np.random.default_rng(11)
    lines = ["arrival_s,prompt_tokens,output_tokens"]
    for burst in range(num_bursts):
        for number in range(size):
            prompt, answer = rng.integers(100, 900), rng.integers(20, 200)
            lines.append(f"{burst * gap_s + number * 1e-3},{prompt},{answer}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("slo", [{"ttft_s": 2.0}, {"ttft_s": 0.5, "attainment": 0.5}])
def test_limits_refuse_nobody_of_the_recorded_bursts_that_the_plan_was_made_for(
    tmp_path: Path, slo: dict[str, Any]
) -> None:
    path = tmp_path / "bursts.csv"
    bursts(path, num_bursts=40, size=30, gap_s=30.0)
    inputs = small_inputs(
        rules="pdserve",
        workload={"trace": str(path), "arrivals": "recorded", "rate": 1.0},
        objective={"goal": "cost"},
        slo={"tpot_s": 0.2, **slo},
        search={"duration_s": 300},
    )
    result = solve(inputs)
    assert isinstance(result, PlanResult)
    plan = plan_of(result)
    assert plan.limits.max_num_waiting >= 30
    limits = PdserveOptions(
        max_step_tokens=plan.limits.max_step_tokens,
        max_num_requests=plan.limits.max_num_requests,
        max_num_waiting=plan.limits.max_num_waiting,
        max_wait_s=plan.limits.max_wait_s,
    )
    simulator = Simulator(result.design.config(SimulationConfig(pools=(), pdserve=limits)))
    traffic = Traffic(inputs.workload, (TrafficClass(ttft_s=slo["ttft_s"], tpot_s=0.2),))
    for seed in range(result.prediction.num_seeds):
        trace, _ = traffic.trace(seed, result.prediction.rate, result.prediction.horizon_s)
        assert simulator.run(trace).num_refused == 0
