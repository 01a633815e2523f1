"""Runs by the planner's own simulator, rules pdserve: disaggregated ones, and any as a check."""

import numpy as np

from bench.latency_fidelity.load import answer_lengths, num_requests, prompt_lengths
from bench.latency_fidelity.rows import Run, Workers
from placement.demand import Workload
from placement.framework import Framework
from placement.hardware import network_link
from placement.latency import composed_latency, kv_capacity_tokens
from placement.simulate import simulate
from placement.simulation.timing import StepTiming
from placement.simulation.values import (
    Link,
    PdserveOptions,
    Pool,
    PoolRole,
    SimulationConfig,
    SimulationResult,
)

MAX_BATCH = 512
STEP_TOKENS = 8192


def simulate_pools(run: Run, framework: Framework) -> SimulationResult:
    """Raises `LocalFault` where a request fits no instance."""
    assert run.prefill is not None
    assert run.decode is not None
    batch = max(1, min(-(-run.clients // run.decode.count), MAX_BATCH))
    reader = _pool(run, framework, PoolRole.PREFILL, run.prefill, batch)
    writer = _pool(run, framework, PoolRole.DECODE, run.decode, batch)
    num_prompts = run.harness.num_prompts if run.engine.keeps_prefixes else None
    config = SimulationConfig(
        pools=(reader, writer),
        concurrency=run.clients,
        pdserve=PdserveOptions(
            max_step_tokens=STEP_TOKENS,
            max_num_requests=batch,
            prefix_cache_tokens=reader.kv_tokens if num_prompts else 0,
        ),
    )
    return simulate(config, _workload(run, num_prompts))


def simulate_instance(run: Run, framework: Framework) -> SimulationResult:
    """An aggregated run as our own colocated worker would batch it."""
    engine = run.engine
    batch = max(1, min(run.clients - engine.spare_clients, MAX_BATCH))
    workers = Workers(count=1, cut=run.cut, is_count_stated=True)
    pool = _pool(run, framework, PoolRole.COLOCATED, workers, batch)
    num_prompts = run.harness.num_prompts if engine.keeps_prefixes else None
    config = SimulationConfig(
        pools=(pool,),
        concurrency=run.clients,
        pdserve=PdserveOptions(
            max_step_tokens=engine.step_tokens,
            max_num_requests=batch,
            handoff_s=0.0,
            prefix_cache_tokens=pool.kv_tokens if num_prompts else 0,
        ),
    )
    return simulate(config, _workload(run, num_prompts))


def _workload(run: Run, num_prompts: int | None) -> Workload:
    """Prompts of one block each, so that one that comes again is found whole."""
    num = num_requests(run)
    return Workload(
        prompt_tokens=prompt_lengths(run),
        output_tokens=answer_lengths(run),
        prefix_starts=None if num_prompts is None else np.arange(num + 1),
        prefix_ids=None if num_prompts is None else np.arange(num) % num_prompts,
        prefix_block_tokens=run.prompt_tokens,
    )


def _pool(run: Run, framework: Framework, role: PoolRole, workers: Workers, batch: int) -> Pool:
    link = network_link(run.gpu)
    cut = workers.cut
    timing = StepTiming.of_model(
        composed_latency(run.spec, run.gpu, cut, framework),
        max_num_requests=batch,
        prompt_tokens=run.prompt_tokens,
        context_tokens=run.prompt_tokens + run.output_tokens // 2,
    )
    share = run.engine.memory_share
    return Pool(
        role=role,
        replicas=workers.count,
        timing=timing,
        tp=cut.tp,
        pp=cut.pp,
        gpu=run.gpu.name,
        kv_tokens=kv_capacity_tokens(run.spec, run.gpu, cut, memory_share=share),
        kv_bytes_per_token=run.spec.kv_bytes_per_token(),
        link=Link(bytes_per_s=link.bytes_per_s * cut.stage_gpus, latency_s=link.latency_s),
        prompt_s=framework.prompt_s,
        prompt_token_s=framework.prompt_token_s,
    )
