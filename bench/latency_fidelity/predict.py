"""From a measured run to the model's TTFT and TPOT: means over requests, as harnesses report."""

import numpy as np

from bench.latency_fidelity.closed_loop import grid_arrays, serve
from bench.latency_fidelity.rows import (
    INFERENCEX_LENGTHS,
    Run,
)
from placement.demand import Workload
from placement.framework import Framework, find_framework
from placement.hardware import network_link
from placement.latency import composed_latency, kv_capacity_tokens
from placement.model_spec import Parallelism
from placement.simulate import simulate
from placement.simulation.timing import StepTiming
from placement.simulation.values import Link, PdserveOptions, Pool, PoolRole, SimulationConfig

MAX_REQUESTS = 4096
MAX_POOL_BATCH = 512
POOL_STEP_TOKENS = 8192
MATCHED_UTILISATION = 0.9


def framework_of(run: Run) -> Framework:
    return find_framework(*run.family)


def lengths(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output lengths of each request, the same for every call."""
    count = max(min(run.concurrency * run.engine.num_waves, MAX_REQUESTS), 2 * run.concurrency)
    if not run.is_inferencex:
        return np.full(count, run.prompt_tokens), np.full(count, run.output_tokens)
    rng = np.random.default_rng(0)

    def draw(nominal: int) -> np.ndarray:
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
    limits = (
        float(budget),
        float(max(capacity, run.prompt_tokens + run.output_tokens)),
        float(max(run.concurrency - engine.spare_clients, 1)),
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
    batch = max(1, min(-(-run.concurrency // run.decode[0]), MAX_POOL_BATCH))
    pools = (
        _pool(run, framework, PoolRole.PREFILL, run.prefill, batch),
        _pool(run, framework, PoolRole.DECODE, run.decode, batch),
    )
    concurrency = run.concurrency if run.is_concurrency_stated else _matched_load(run, framework)
    config = SimulationConfig(
        pools=pools,
        concurrency=concurrency,
        pdserve=PdserveOptions(max_step_tokens=POOL_STEP_TOKENS, max_num_requests=batch),
    )
    prompts, outputs = lengths(run)
    result = simulate(config, Workload(prompt_tokens=prompts, output_tokens=outputs))
    delay = framework.reply_s + framework.prompt_s + framework.prompt_token_s * run.prompt_tokens
    return float(np.mean(result.ttft_s)) + delay, float(np.mean(result.tpot_s))


def _pool(
    run: Run, framework: Framework, role: PoolRole, workers: tuple[int, Parallelism], batch: int
) -> Pool:
    replicas, cut = workers
    link = network_link(run.gpu)
    timing = StepTiming.of_model(
        composed_latency(run.spec, run.gpu, cut, framework),
        max_num_requests=batch,
        prompt_tokens=run.prompt_tokens,
        context_tokens=run.prompt_tokens + run.output_tokens // 2,
    )
    share = run.engine.memory_share
    return Pool(
        role=role,
        replicas=replicas,
        timing=timing,
        tp=cut.tp,
        gpu=run.gpu.name,
        kv_tokens=kv_capacity_tokens(run.spec, run.gpu, cut, memory_share=share),
        kv_bytes_per_token=run.spec.kv_bytes_per_token(),
        link=Link(bytes_per_s=link.bytes_per_s * cut.stage_gpus, latency_s=link.latency_s),
    )


def _matched_load(run: Run, framework: Framework) -> int:
    """Concurrency of runs that state only batch limits: what the prefill pool can feed."""
    assert run.prefill is not None
    assert run.decode is not None
    prefill = composed_latency(run.spec, run.gpu, run.prefill[1], framework)
    decode = composed_latency(run.spec, run.gpu, run.decode[1], framework)
    rate = run.prefill[0] / prefill.prefill_s([run.prompt_tokens])
    batch = -(-run.concurrency // run.decode[0])
    step_s = decode.decode_s(batch, run.prompt_tokens + run.output_tokens / 2)
    fed = MATCHED_UTILISATION * rate * step_s * run.output_tokens
    return max(1, min(run.concurrency, int(fed)))
