"""`latency: {gpu, model}` of sim.yaml: storage and framework change times, and a run is met."""

from typing import Any

import numpy as np
import pytest

from pdserve.domain.errors import LocalFault
from placement.demand import Workload
from placement.framework import find_framework
from placement.simulate import simulate
from placement.simulation.settings import parse_config
from placement.simulation.values import SimulationResult

LLAMA = {"gpu": "h200_sxm", "model": "meta-llama/Llama-3.1-70B"}


def closed_loop(latency: dict[str, str], *, clients: int = 16, tokens: int = 1024) -> Any:
    return {
        "latency": latency,
        "pools": [{"role": "colocated", "tp": 4}],
        "arrivals": {"concurrency": clients},
        "pdserve": {"max_step_tokens": 2 * tokens, "max_num_requests": clients, "handoff_s": 0},
    }


def run(latency: dict[str, str], *, clients: int = 16, tokens: int = 1024) -> SimulationResult:
    config = parse_config(closed_loop(latency, clients=clients, tokens=tokens), source="sim.yaml")
    lengths = np.full(16 * clients, tokens)
    return simulate(config, Workload(prompt_tokens=lengths, output_tokens=lengths))


def test_a_measured_closed_loop_is_met_through_sim_yaml() -> None:
    """Qwen3-32B, vLLM 0.12.0, 4 x H100, 64 clients, 1024 / 1024: 243 ms and 17.3 ms measured."""
    latency = {"gpu": "h100_sxm", "model": "Qwen/Qwen3-32B", "framework": "vllm"}
    result = run(latency, clients=64)
    assert np.mean(result.ttft_s) == pytest.approx(0.243, rel=0.1)
    assert np.mean(result.tpot_s) == pytest.approx(0.0173, rel=0.05)


def test_narrower_weights_and_kv_are_read_faster() -> None:
    tpot = [
        float(np.mean(run(LLAMA | storage).tpot_s))
        for storage in ({}, {"weights": "fp8"}, {"weights": "fp8", "kv": "fp8"})
    ]
    assert tpot[0] > 1.1 * tpot[1]
    assert tpot[1] > tpot[2]


def test_the_frameworks_numbers_of_that_precision_and_gpu_are_taken() -> None:
    latency = LLAMA | {"weights": "fp8", "framework": "trtllm"}
    pool = parse_config(closed_loop(latency), source="sim.yaml").pools[0]
    expected = find_framework("trtllm", "fp8", "h200_sxm")
    assert expected.prompt_s != find_framework("pdserve").prompt_s
    assert (pool.prompt_s, pool.prompt_token_s) == (expected.prompt_s, expected.prompt_token_s)


@pytest.mark.parametrize(
    ("latency", "told"),
    [
        (LLAMA | {"framework": "tgi"}, "unknown framework 'tgi'; known: pdserve, sglang"),
        (LLAMA | {"weights": "fp7"}, "unknown precision 'fp7'"),
        (
            {"profile": "profiler-a100-80g.distserve.json", "model": "x", "kv": "fp8"},
            "weights, kv and framework go with gpu, not with profile",
        ),
    ],
)
def test_settings_that_do_not_apply_are_told(latency: dict[str, str], told: str) -> None:
    with pytest.raises(LocalFault, match=told):
        parse_config(closed_loop(latency), source="sim.yaml")
