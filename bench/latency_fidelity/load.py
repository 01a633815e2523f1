"""What the load generators send: lengths of each request, the same for every call."""

import numpy as np

from bench.latency_fidelity.rows import Run
from placement.simulation.trace import Ints

MAX_REQUESTS = 4096
CACHE_BLOCK = 16  # tokens of a block: a prompt's last one is computed again


def num_requests(run: Run) -> int:
    waves = run.harness.num_waves
    return max(min(run.clients * waves, MAX_REQUESTS), 2 * run.clients)


def prompt_lengths(run: Run) -> Ints:
    return _lengths(run, run.prompt_tokens, seed=0)


def answer_lengths(run: Run) -> Ints:
    return _lengths(run, run.output_tokens, seed=1)


def _lengths(run: Run, nominal: int, *, seed: int) -> Ints:
    num, shortest = num_requests(run), run.harness.shortest
    if shortest == 1.0:
        return np.full(num, nominal)
    return np.random.default_rng(seed).integers(int(nominal * shortest), nominal + 1, num)


def found_tokens(run: Run, capacity: int) -> Ints:
    """Tokens of each prompt that the prefix cache holds when it arrives.

    `capacity` KV tokens less what the clients' own requests take are left to keep prompts.
    """
    order = np.arange(num_requests(run))
    found = np.zeros(len(order), np.int64)
    num_prompts = run.harness.num_prompts
    if num_prompts is None or not run.engine.keeps_prefixes:
        return found
    spare = capacity - run.clients * (run.prompt_tokens + run.output_tokens)
    num_kept = min(max(spare // run.prompt_tokens, 0), num_prompts)
    is_found = (order >= num_prompts) & (order % num_prompts < num_kept)
    found[is_found] = (run.prompt_tokens - 1) // CACHE_BLOCK * CACHE_BLOCK
    return found
