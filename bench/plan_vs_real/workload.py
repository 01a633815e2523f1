"""The bench's requests, the same for the cluster and for the simulator."""

from collections.abc import Sequence

import numpy as np

from pdserve.client.workload import TraceRequest
from placement.simulation.trace import Trace

MEAN_PROMPT_TOKENS, PROMPT_CV = 240, 0.4
MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 96, 700
"""The profile's shortest probe; above, the demo model's context ends."""
MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS = 6, 30


def draw_requests(num: int, rate: float, seed: int) -> tuple[TraceRequest, ...]:
    """Poisson arrivals, lognormal prompts, uniform answers. One seed has the same requests at
    every rate."""
    rng = np.random.default_rng(seed)
    variance = np.log1p(PROMPT_CV**2)
    prompts = rng.lognormal(np.log(MEAN_PROMPT_TOKENS) - variance / 2, np.sqrt(variance), num)
    prompts = np.clip(np.rint(prompts), MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS)
    outputs = rng.integers(MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS, num, endpoint=True)
    arrival_s = np.cumsum(rng.exponential(1.0, num)) / rate
    return tuple(
        TraceRequest(float(at), int(prompt), int(output))
        for at, prompt, output in zip(arrival_s, prompts, outputs, strict=True)
    )


def to_trace(requests: Sequence[TraceRequest]) -> Trace:
    return Trace(
        arrival_s=np.array([request.arrival_s for request in requests]),
        prompts=np.array([request.prompt_tokens for request in requests], np.int64),
        outputs=np.array([request.output_tokens for request in requests], np.int64),
    )
