"""From a measured run to the model's TTFT and TPOT: means over all requests, as harnesses report."""

import numpy as np

from bench.latency_fidelity.closed_loop import grid_arrays, serve
from bench.latency_fidelity.rows import (
    INFERENCEX_LENGTHS,
    INFERENCEX_WAVES,
    SWEEP_VLLM_TOKENS,
    Run,
)
from placement.demand import Workload
from placement.framework import Framework, find_framework
from placement.hardware import network_link
from placement.latency import composed_latency, kv_capacity_tokens
from placement.simulate import simulate
from placement.simulation.timing import StepTiming
from placement.simulation.values import Link, PdserveOptions, Pool, PoolRole, SimulationConfig

MAX_REQUESTS = 4096
MAX_POOL_BATCH = 512


def framework_of(run: Run) -> Framework:
    return find_framework(*run.family)


def lengths(run: Run) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Prompt and output lengths of each request, the same for every call."""
    waves = INFERENCEX_WAVES if run.is_inferencex else run.engine.num_waves
    count = max(min(run.concurrency * waves, MAX_REQUESTS), 2 * run.concurrency)
    if not run.is_inferencex:
        return np.full(count, run.prompt_tokens), np.full(count, run.output_tokens)
    rng = np.random.default_rng(0)

    def draw(nominal: int) -> np.ndarray:  # type: ignore[type-arg]
        return rng.integers(int(nominal * INFERENCEX_LENGTHS), nominal + 1, count)

    return draw(run.prompt_tokens), draw(run.output_tokens)


def predict(run: Run, framework: Framework | None = None) -> tuple[float, float]:
    """(TTFT, TPOT) in seconds."""
    framework = framework or framework_of(run)
    if run.is_disaggregated:
        return _predict_pools(run, framework)
    model = composed_latency(run.spec, run.gpu, run.cut, framework)
    capacity = kv_capacity_tokens(
        run.spec, run.gpu, run.cut, memory_share=run.engine.memory_share, max_num_seqs=64
    )
    prompts, outputs = lengths(run)
    engine = run.engine
    budget = engine.step_tokens or engine.prompts_per_step * run.prompt_tokens
    if run.is_inferencex and run.backend == "vllm":
        budget = SWEEP_VLLM_TOKENS
    limits = (
        float(budget),
        float(max(capacity, run.prompt_tokens + run.output_tokens)),
        1e9,
        float(engine.prompts_per_step),
    )
    ttft, tpot = serve(
        grid_arrays(model.grid), engine.rule, limits, prompts, outputs, run.concurrency
    )
    return float(np.mean(ttft)), float(np.mean(tpot))


def _predict_pools(run: Run, framework: Framework) -> tuple[float, float]:
    """By the planner's simulator, rules pdserve: one frontend delay and our own batching."""
    assert run.prefill is not None
    assert run.decode is not None
    prompts, outputs = lengths(run)
    batch = max(1, min(-(-run.concurrency // run.decode[0]), MAX_POOL_BATCH))
    link = network_link(run.gpu)
    pools = []
    for role, (replicas, cut) in ((PoolRole.PREFILL, run.prefill), (PoolRole.DECODE, run.decode)):
        model = composed_latency(run.spec, run.gpu, cut, framework)
        share = run.engine.memory_share
        pools.append(
            Pool(
                role=role,
                replicas=replicas,
                timing=StepTiming.of_model(
                    model,
                    max_num_requests=batch,
                    prompt_tokens=run.prompt_tokens,
                    context_tokens=run.prompt_tokens + run.output_tokens // 2,
                ),
                tp=cut.tp,
                gpu=run.gpu.name,
                kv_tokens=kv_capacity_tokens(run.spec, run.gpu, cut, memory_share=share),
                kv_bytes_per_token=run.spec.kv_bytes_per_token(),
                link=Link(bytes_per_s=link.bytes_per_s * cut.stage_gpus, latency_s=link.latency_s),
            )
        )
    config = SimulationConfig(
        pools=tuple(pools),
        concurrency=run.concurrency,
        pdserve=PdserveOptions(max_step_tokens=SWEEP_VLLM_TOKENS, max_num_requests=batch),
    )
    workload = Workload(
        prompt_tokens=prompts, output_tokens=outputs, arrival_s=np.zeros(len(prompts))
    )
    result = simulate(config, workload)
    delay = framework.reply_s + framework.prompt_s + framework.prompt_token_s * run.prompt_tokens
    return float(np.mean(result.ttft_s)) + delay, float(np.mean(result.tpot_s))
