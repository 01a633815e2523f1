"""The simulator's behaviour under our own rules, its summary, and `pdserve simulate`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepCoefficients, StepShape
from placement.demand import Workload
from placement.simulate import Simulator, assign_classes, attained, simulate
from placement.simulation.running import format_requests, run_simulation
from placement.simulation.settings import EXAMPLE, parse_config
from placement.simulation.summary import Verdict, attainment_interval, summarise
from placement.simulation.timing import StepTiming
from placement.simulation.values import (
    Link,
    PdserveOptions,
    Pool,
    PoolRole,
    SimulationConfig,
    SimulationResult,
    TrafficClass,
)

COEFFICIENTS = StepCoefficients(
    fixed_s=0.01,
    prefill_token_s=1e-4,
    prefill_attention_s=1e-9,
    decode_token_s=1e-4,
    decode_context_token_s=1e-7,
)
SLO = TrafficClass(ttft_s=0.5, tpot_s=0.05)
HANDOFF_S = 0.002


def pool(role: PoolRole, replicas: int = 1, **changes: Any) -> Pool:
    fields: dict[str, Any] = {
        "timing": StepTiming.of_coefficients(COEFFICIENTS),
        "kv_tokens": 100_000,
        "kv_bytes_per_token": 1e5,
        "link": Link(bytes_per_s=1e9),
        **changes,
    }
    return Pool(role=role, replicas=replicas, **fields)


def pair(**changes: Any) -> tuple[Pool, Pool]:
    return (pool(PoolRole.PREFILL, **changes), pool(PoolRole.DECODE, **changes))


def workload(*requests: tuple[float, int, int], **changes: Any) -> Workload:
    arrivals, prompts, outputs = zip(*requests, strict=True)
    return Workload(
        arrival_s=np.array(arrivals, float),
        prompt_tokens=np.array(prompts, np.int64),
        output_tokens=np.array(outputs, np.int64),
        **changes,
    )


def poisson(rate: float, num: int = 2_000) -> Workload:
    rng = np.random.default_rng(0)
    return Workload(
        arrival_s=np.cumsum(rng.exponential(1 / rate, num)),
        prompt_tokens=rng.integers(100, 1_000, num),
        output_tokens=rng.integers(10, 200, num),
    )


def run(
    pools: tuple[Pool, ...], load: Workload, options: PdserveOptions | None = None, **changes: Any
) -> SimulationResult:
    config = SimulationConfig(pools=pools, pdserve=options or PdserveOptions(), **changes)
    return simulate(config, load)


def prefill_s(*chunks: tuple[int, int]) -> float:
    return sum(COEFFICIENTS.step_s(StepShape.of([chunk])) for chunk in chunks)


def test_a_lone_request_takes_its_chunks_its_last_chunk_s_transfer_and_its_steps() -> None:
    result = run(pair(), workload((1.0, 1_000, 3)))
    read_s = prefill_s((0, 512), (512, 488))
    assert result.ttft_s[0] == pytest.approx(read_s + HANDOFF_S)
    # The first chunk's KV, 51.2 ms, overlaps the second chunk's step, 59 ms.
    transfer_s = 488 * 1e5 / 1e9
    steps_s = sum(
        COEFFICIENTS.step_s(StepShape.of(decode_contexts=[context])) for context in (1_001, 1_002)
    )
    assert result.e2e_s[0] == pytest.approx(read_s + transfer_s + steps_s)
    assert result.tpot_s[0] == pytest.approx((result.e2e_s[0] - result.ttft_s[0]) / 2)
    assert (result.prefill[0], result.decode[0]) == (0, 1)


def test_host_time_comes_before_the_first_step_and_holds_nothing_up() -> None:
    load = workload((0.0, 100, 1), (0.0, 300, 1))
    pools = pair(prompt_s=0.5, prompt_token_s=1e-3)
    result = run(pools, load)
    expected = [0.6 + prefill_s((0, 100)) + HANDOFF_S, 0.8 + prefill_s((0, 300)) + HANDOFF_S]
    assert result.ttft_s.tolist() == pytest.approx(expected)


def test_one_token_needs_no_decode() -> None:
    result = run(pair(), workload((0.0, 100, 1)))
    assert result.tpot_s[0] == 0
    assert result.e2e_s[0] == result.ttft_s[0]
    assert result.decode[0] == -1


def test_blocks_are_promised_before_the_prompt_is_read() -> None:
    small = pair(kv_tokens=1_600)
    result = run(small, workload((0.0, 500, 500), (0.0, 500, 500), (0.0, 500, 100)))
    first_end_s = result.e2e_s[0]
    # The second needs what the first holds; the third would fit but does not overtake.
    assert result.ttft_s[1] > first_end_s
    assert result.ttft_s[2] > first_end_s


def test_transfers_to_one_decode_instance_share_its_link() -> None:
    pools = (pool(PoolRole.PREFILL, 2, link=Link(bytes_per_s=1e9)), pool(PoolRole.DECODE))
    alone = run(pools, workload((0.0, 512, 2)))
    both = run(pools, workload((0.0, 512, 2), (0.0, 512, 2)))
    transfer_s = 512 * 1e5 / 1e9
    assert both.ttft_s.tolist() == pytest.approx([alone.ttft_s[0]] * 2)
    assert both.e2e_s.max() - alone.e2e_s[0] == pytest.approx(transfer_s, rel=0.02)


def test_deadline_order_reads_the_urgent_prompt_first() -> None:
    load = workload(
        (0.0, 2_000, 2), (0.001, 2_000, 2), (0.002, 100, 2), class_index=np.array([1, 1, 0])
    )
    slo = (TrafficClass(ttft_s=0.1, tpot_s=1), TrafficClass(ttft_s=5, tpot_s=1))
    fcfs = run(pair(), load, slo=slo)
    urgent = run(pair(), load, PdserveOptions(prefill_order="deadline"), slo=slo)
    assert urgent.ttft_s[2] < fcfs.ttft_s[2] / 3
    assert urgent.ttft_s[1] > fcfs.ttft_s[1]


def test_a_cached_prefix_is_not_read_again_and_the_oldest_goes_first() -> None:
    ids = np.array([0, 1, 0, 1, 2, 3, 0, 1])
    load = workload(
        (0.0, 1_000, 2),
        (1.0, 1_000, 2),
        (2.0, 1_000, 2),
        (3.0, 1_000, 2),
        prefix_starts=np.array([0, 2, 4, 6, 8]),
        prefix_ids=ids,
    )
    large = run(pair(), load, PdserveOptions(prefix_cache_tokens=4 * 512))
    assert large.prefix_hit_tokens == 999 + 999  # the last token is always read
    assert large.ttft_s[1] == pytest.approx(prefill_s((999, 1)) + HANDOFF_S)
    small = run(pair(), load, PdserveOptions(prefix_cache_tokens=2 * 512))
    assert small.prefix_hit_tokens == 999  # the third prompt drove the first two's out
    assert run(pair(), load).prefix_hit_tokens == 0


def test_a_full_cluster_refuses_and_says_so() -> None:
    result = run(pair(), poisson(200.0, 300), PdserveOptions(max_num_waiting=5))
    assert 0 < result.num_refused < 300
    refused = np.isinf(result.ttft_s)
    assert refused.sum() == result.num_refused
    assert set(result.prefill[refused]) == {-1}
    assert result.ttft_s[~refused].max() < 1.0
    config = SimulationConfig(pools=pair(), slo=(SLO,))
    summary = summarise(config, result, np.full(300, 10))
    assert summary.classes[0].attainment <= 1 - result.num_refused / 300
    json.dumps(summary.to_json(), allow_nan=False)


def test_a_closed_loop_keeps_so_many_requests_under_way() -> None:
    result = run(pair(), poisson(1.0, 400), concurrency=8)
    begin, end = result.arrival_s, result.arrival_s + result.e2e_s
    at_arrivals = [(int(((begin <= t) & (end > t)).sum())) for t in begin[8:]]
    assert set(at_arrivals) == {8}
    assert sorted(begin)[:8] == [0.0] * 8


def test_pipeline_depth_raises_prefill_throughput() -> None:
    burst = workload(*[(0.0, 512, 1)] * 20)
    flat = run((pool(PoolRole.PREFILL), pool(PoolRole.DECODE)), burst)
    deep = run((pool(PoolRole.PREFILL, pp=4), pool(PoolRole.DECODE)), burst)
    step_s = prefill_s((0, 512))
    assert flat.e2e_s.max() == pytest.approx(20 * step_s + HANDOFF_S)
    assert deep.e2e_s.max() == pytest.approx((20 + 3) * step_s / 4 + HANDOFF_S)


@pytest.mark.parametrize(("rate", "verdict"), [(4.0, Verdict.STABLE), (60.0, Verdict.OVERLOADED)])
def test_load_beyond_capacity_is_called_overload(rate: float, verdict: Verdict) -> None:
    config = SimulationConfig(pools=pair(), slo=(SLO,))
    load = poisson(rate)
    summary = summarise(config, simulate(config, load), load.output_tokens)
    assert summary.load.verdict is verdict


def test_one_unit_trace_serves_all_rates() -> None:
    load = poisson(1.0)
    simulator = Simulator(SimulationConfig(pools=pair()))
    shares = [attained(simulator.run(load.trace(rate)), SLO) for rate in (2.0, 8.0, 16.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert shares[2] < 0.5


def test_an_interval_holds_its_share_and_widens_with_runs_of_misses() -> None:
    met = np.ones(2_000, bool)
    met[::10] = False
    clustered = np.ones(2_000, bool)
    clustered[900:1_100] = False
    narrow, wide = attainment_interval(met), attainment_interval(clustered)
    assert narrow[0] < 0.9 < narrow[1]
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def test_classes_are_drawn_by_share_and_the_same_each_time() -> None:
    slo = (TrafficClass(ttft_s=1, tpot_s=1, share=3), TrafficClass(ttft_s=1, tpot_s=1, share=1))
    classes = assign_classes(10_000, slo)
    assert float(np.mean(classes == 0)) == pytest.approx(0.75, abs=0.02)
    assert classes.tolist() == assign_classes(10_000, slo).tolist()


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (workload((0.0, 200_000, 2)), "request 0: prompt and answer need the KV of 200001 tokens"),
        (workload((0.0, 10, 5), (0.0, 10, 0)), "request 1: output_tokens must be at least 1"),
    ],
)
def test_a_request_that_can_never_be_served_is_an_error(load: Workload, message: str) -> None:
    with pytest.raises(LocalFault, match=message):
        run(pair(), load)


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "rules": "distserve",
        "latency": {
            "profile": "profiler-a100-80g.distserve.json",
            "model": "facebook/opt-13b",
        },
        "pools": [{"role": "prefill", "tp": 2}, {"role": "decode", "tp": 1}],
        "slo": {"ttft_s": 0.2, "tpot_s": 0.1},
        "arrivals": {"rate": 4.0},
        **changes,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rulez": 1}, "rulez: unknown field; did you mean rules"),
        ({"pools": [{"role": "prefil"}]}, r"pools\[0\]: role: .*'prefill', 'decode'"),
        ({"pools": [{"role": "decode", "replica": 2}]}, "did you mean replicas"),
        ({"pools": []}, "pools"),
        ({"pools": [{"role": "decode"}]}, "prefill and decode"),
        ({"slo": [{"ttft": 1, "tpot_s": 1}]}, r"slo\[0\]: .*did you mean ttft_s"),
        ({"arrivals": {"rate": -1}}, "rate"),
        ({"arrivals": {"concurrency": 3}}, "needs rules: pdserve"),
        ({"arrivals": {"concurrency": 3, "rate": 1}}, "not both"),
        ({"rules": "splitwise"}, "Splitwise's CSV"),
        ({"latency": {"gpu": "h100", "model": "x"}}, "need a profile"),
    ],
)
def test_a_bad_configuration_is_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalFault, match=message):
        Simulator(parse_config(settings(**change), source="sim.yaml"))


def test_a_gpu_is_a_source_of_latency_too() -> None:
    latency = {"gpu": "h100", "model": "Llama-3.1-8B"}
    config = parse_config(settings(rules="pdserve", latency=latency), source="sim.yaml")
    result = simulate(config, poisson(2.0, 50))
    assert 0.003 < float(np.median(result.tpot_s)) < 0.03
    with pytest.raises(LocalFault, match="did you mean h100"):
        parse_config(
            settings(rules="pdserve", latency={**latency, "gpu": "h1000"}), source="sim.yaml"
        )


def write_inputs(folder: Path) -> tuple[Path, Path]:
    rows = [f"{0.3 * i},{100 + 37 * (i % 11)},{5 + i % 7}" for i in range(60)]
    trace, config = folder / "w.csv", folder / "sim.yaml"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    config.write_text(EXAMPLE.replace("arrivals: {rate: 4.0}", "arrivals: recorded"))
    return config, trace


def test_the_example_runs_and_its_files_are_the_same_whatever_the_hash_seed(
    tmp_path: Path,
) -> None:
    config, trace = write_inputs(tmp_path)
    contents = []
    for seed in ("1", "2"):
        out, result = tmp_path / f"out{seed}.csv", tmp_path / f"result{seed}.json"
        code = (
            "from pathlib import Path; from placement.simulation.running import run_simulation; "
            f"run_simulation(Path({str(config)!r}), Path({str(trace)!r}), "
            f"requests_file=Path({str(out)!r}), json_file=Path({str(result)!r}))"
        )
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
        contents.append((out.read_bytes(), result.read_bytes()))
    assert contents[0] == contents[1]
    lines = contents[0][0].decode().splitlines()
    assert lines[0] == "request,arrival_s,ttft_s,tpot_s,e2e_s,prefill,decode"
    assert len(lines) == 61
    assert json.loads(contents[0][1])["num_requests"] == 60


def test_times_are_written_to_the_last_digit() -> None:
    result = run(pair(), poisson(2.0, 20))
    rows = [line.split(",") for line in format_requests(result).splitlines()[1:]]
    assert [float(row[2]) for row in rows] == result.ttft_s.tolist()


def test_a_class_that_the_configuration_lacks_is_an_error(tmp_path: Path) -> None:
    config, trace = write_inputs(tmp_path)
    trace.write_text("arrival_s,prompt_tokens,output_tokens,slo_class\n0,5,5,0\n1,5,5,4\n")
    with pytest.raises(LocalFault, match="request 1: slo_class 4"):
        run_simulation(config, trace, requests_file=None, json_file=None)
