"""From a measured run to the model's TTFT and TPOT: means over requests, as harnesses report."""

import numpy as np

from bench.latency_fidelity.closed_loop import grid_arrays, serve
from bench.latency_fidelity.load import answer_lengths, found_tokens, prompt_lengths
from bench.latency_fidelity.pools import simulate_instance, simulate_pools
from bench.latency_fidelity.rows import Run
from pdserve.domain.errors import LocalFault
from placement.framework import Framework, find_framework
from placement.hardware import network_link
from placement.latency import composed_latency, kv_capacity_tokens


def framework_of(run: Run) -> Framework:
    return find_framework(*run.family)


def predict(run: Run, framework: Framework | None = None) -> tuple[float, float]:
    """(TTFT, TPOT) in seconds; raises `LocalFault` for a run that no such machine could make."""
    framework = framework or framework_of(run)
    if run.is_disaggregated:
        return _predict_pools(run, framework)
    capacity = instance_tokens(run)
    if not fits(run):
        raise LocalFault(
            f"{run.model} with one request of {run.prompt_tokens + run.output_tokens} tokens does "
            f"not fit {run.cut.num_gpus} x {run.gpu.name}"
        )
    model, engine = composed_latency(run.spec, run.gpu, run.cut, framework), run.engine
    limits = (
        float(engine.step_tokens),
        float(capacity),
        float(max(run.clients - engine.spare_clients, 1)),
        float(engine.prompts_per_step),
    )
    ttft, tpot = serve(
        grid_arrays(model.grid),
        engine.rule,
        limits,
        prompt_lengths(run),
        found_tokens(run, capacity),
        answer_lengths(run),
        run.clients,
    )
    return float(np.mean(ttft)), float(np.mean(tpot))


def predict_by_planner(run: Run) -> tuple[float, float]:
    """The same by the simulator that `pdserve simulate` and `pdserve plan` use.

    Its batching is our own workers', so only rows of engines that batch alike should agree.
    """
    framework = framework_of(run)
    if run.is_disaggregated or not fits(run):
        return predict(run, framework)
    result = simulate_instance(run, framework)
    return float(np.mean(result.ttft_s)) + framework.reply_s, float(np.mean(result.tpot_s))


def instance_tokens(run: Run) -> int:
    """KV tokens that one aggregated instance holds."""
    share = run.engine.memory_share
    return kv_capacity_tokens(run.spec, run.gpu, run.cut, memory_share=share, max_num_seqs=64)


def fits(run: Run) -> bool:
    """Whether an aggregated instance holds the model and one request."""
    return instance_tokens(run) >= run.prompt_tokens + run.output_tokens


def _predict_pools(run: Run, framework: Framework) -> tuple[float, float]:
    """The measured engines show the first token when its KV has landed, not when it is sampled."""
    assert run.prefill is not None
    result = simulate_pools(run, framework)
    link = network_link(run.gpu)
    kv_bytes = run.spec.kv_bytes(run.prompt_tokens)
    landing_s = link.transfer_s(kv_bytes, run.prefill.cut.stage_gpus)
    ttft_s = float(np.mean(result.ttft_s)) + landing_s + framework.reply_s
    num_gaps = np.maximum(answer_lengths(run) - 1, 1)
    return ttft_s, float(np.mean(result.tpot_s - landing_s / num_gaps))
