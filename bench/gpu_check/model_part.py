"""Whole steps of the engine against what the machine could do.

A decode step has to read all weights but the embedding, and the KV of its requests: its floor is
these bytes over the rate at which a copy reads and writes. A prefill step multiplies each token
with each weight twice over: its floor is that over the rate of a large matrix product.
"""

import statistics
import time
from collections.abc import Iterator

from bench.gpu_check.findings import Finding
from bench.gpu_check.machine import Machine
from bench.gpu_check.whole_models import OpenedModel, Requests, opened_model
from pdserve.engine.contract import StepBatch, StepLimits


def measure(machine: Machine) -> Iterator[Finding]:
    copy_rate, matrix_rate = machine.copy_bytes_per_s(), machine.matrix_flops()
    context = machine.size(1024, 48)
    batches = machine.size((1, 32, 128), (1, 4))
    limits = StepLimits(max_num_requests=batches[-1], max_num_tokens=machine.size(8192, 96))
    blocks = batches[-1] * -(-context // 16)
    for name in machine.size(("8B", "1B"), ("tiny",)):
        began_s = time.perf_counter()
        attention = machine.size("triton", "torch")
        with opened_model(machine, name, limits, context, blocks, attention) as opened:
            elapsed_s = time.perf_counter() - began_s
            yield Finding(what=f"{name}: ready after", value=elapsed_s, unit="s",
                          note="weights made there, kernels compiled, graphs recorded")  # fmt: skip
            requests = Requests(opened, batches[-1], context)
            requests.read_prompts(context - 1)
            yield from _prefill(opened, requests, context, matrix_rate)
            for batch in batches:
                yield from _decode(opened, requests, batch, context, copy_rate)


def _prefill(
    opened: OpenedModel, requests: Requests, context: int, matrix_rate: float
) -> Iterator[Finding]:
    count = max(1, opened.limits.max_num_tokens // context)
    num_tokens = count * context
    elapsed_s = _step_s(opened, requests.step([(place, 0, context) for place in range(count)]), 5)
    floor_s = 2 * opened.num_weights * num_tokens / matrix_rate
    yield Finding(
        what=f"{opened.name}: prefill of {count} x {context} tokens",
        value=num_tokens / elapsed_s,
        unit="tokens/s",
        note=f"{1e3 * elapsed_s:.1f} ms, {100 * floor_s / elapsed_s:.0f} % of the matrix rate",
    )


def _decode(
    opened: OpenedModel, requests: Requests, batch: int, context: int, copy_rate: float
) -> Iterator[Finding]:
    floor_s = (opened.weight_bytes + opened.kv_bytes(batch * context)) / copy_rate
    step = requests.decode([context] * batch)
    elapsed_s = _step_s(opened, step, 20)
    yield Finding(
        what=f"{opened.name}: decode of {batch} requests at {context} tokens",
        value=batch / elapsed_s,
        unit="tokens/s",
        note=f"{1e3 * elapsed_s:.2f} ms a step, host included; "
        f"{100 * floor_s / elapsed_s:.0f} % of the copy rate",
    )
    sampled_s = _step_s(opened, requests.decode([context] * batch, temperature=0.8), 10)
    yield Finding(
        what=f"{opened.name}: the same, sampled",
        value=batch / sampled_s,
        unit="tokens/s",
        note=f"{1e3 * sampled_s:.2f} ms a step",
    )


def _step_s(opened: OpenedModel, batch: StepBatch, repeats: int) -> float:
    """From the batch to its tokens, as the engine does it; the median."""
    times = []
    for _ in range(repeats + 2 if opened.name != "tiny" else 3):
        began_s = time.perf_counter()
        opened.stepper.run(batch)
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[2:])
