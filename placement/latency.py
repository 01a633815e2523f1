"""How long steps take on a (model, GPU, cut), how sure that is, and where it comes from.

Two sources, and every model says which: measured kernel tables composed over the model's layers;
the datasheet's roofline with stated efficiencies. (What `pdserve profile` fits on the real engine
needs no model: `placement.fitted_profile`.) Whatever the source, a model is one `LatencyGrid`,
which is what the simulator, the solver and `step_s` all read, so that none of them can disagree.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepShape
from placement.framework import Framework, find_framework
from placement.hardware import Gpu
from placement.layer_times import LayerTimes
from placement.model_spec import ONE_GPU, ModelSpec, Parallelism
from placement.tables.interpolate import Array
from placement.tables.kernels import kernels_of


class Source(StrEnum):
    """Where a prediction comes from."""

    MEASURED = "measured kernel tables"
    ROOFLINE = "datasheet roofline"


ROOFLINE_ERROR = 0.3  # against the measured tables, see docs/latency-model.md
UNMEASURED_PART_ERROR = 0.25  # experts and latent attention have no table


def _axis(last: int) -> Array:
    """1, 2, 3, 4, 6, 8, 12, ... up to `last`."""
    powers = [float(2**exponent) for exponent in range(last.bit_length())]
    halves = [1.5 * power for power in powers if 2 <= power < last]
    return np.array(sorted(powers + halves))


TOKENS = _axis(2**17)
DECODES = _axis(2**12)
CONTEXTS = np.array([float(2**exponent) for exponent in range(4, 19)])
LENGTHS = np.array([float(2**exponent) for exponent in range(4, 19)])
CHUNKS = np.array([float(2**exponent) for exponent in range(18)])


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyGrid:
    """A step's time as arrays, for compiled loops.

    step_s = fixed_s
           + linear(tokens)                       tokens = prefill tokens + decodes
           + pairs * rate(chunk, length)          if it prefills: chunk = prefill tokens,
                                                  length = 2 * pairs / chunk - 1
           + prefill_fixed_s                      if it prefills
           + decode(decodes, context)             if it decodes: mean context

    Each table is read by linear interpolation in its arguments (not their logarithms) between the
    two nearest knots of each axis and continued in a straight line beyond the last one; arguments
    below the first knot count as the first. The time is of the whole pipeline; with `num_stages`
    stages a stage is busy for about 1/num_stages of it.
    """

    fixed_s: float
    prefill_fixed_s: float
    prompt_s: float = 0.0  # host times, not the device's: see `placement.framework.Framework`
    prompt_token_s: float = 0.0
    token_s: float = 0.0
    reply_s: float = 0.0
    num_stages: int
    tokens: Array
    linear_s: Array  # [tokens]
    chunks: Array
    lengths: Array
    pair_s: Array  # [chunks, lengths], seconds per (token, attended token) pair
    decodes: Array
    contexts: Array
    decode_s: Array  # [decodes, contexts], without what linear_s counts

    def step_s(self, shape: StepShape) -> float:
        """The formula above, for one step."""
        tokens = shape.num_prefill_tokens + shape.num_decodes
        if tokens == 0:
            return 0.0
        time = self.fixed_s + _read_line(self.tokens, self.linear_s, tokens)
        if shape.num_prefill_tokens:
            chunk = float(shape.num_prefill_tokens)
            length = 2.0 * shape.num_prefill_pairs / chunk - 1.0
            rate = _read_plane((self.chunks, self.lengths), self.pair_s, chunk, length)
            time += self.prefill_fixed_s + rate * shape.num_prefill_pairs
        if shape.num_decodes:
            context = shape.num_decode_context_tokens / shape.num_decodes
            axes = (self.decodes, self.contexts)
            time += _read_plane(axes, self.decode_s, shape.num_decodes, context)
        return time


def _cell(axis: Array, value: float) -> tuple[int, float]:
    value = max(value, float(axis[0]))
    lower = min(int(np.searchsorted(axis, value, side="right")) - 1, len(axis) - 2)
    return lower, (value - float(axis[lower])) / float(axis[lower + 1] - axis[lower])


def _read_line(axis: Array, values: Array, x: float) -> float:
    lower, weight = _cell(axis, x)
    return float(values[lower] + (values[lower + 1] - values[lower]) * weight)


def _read_plane(axes: tuple[Array, Array], values: Array, x: float, y: float) -> float:
    i, u = _cell(axes[0], x)
    j, v = _cell(axes[1], y)
    low = values[i, j] + (values[i, j + 1] - values[i, j]) * v
    high = values[i + 1, j] + (values[i + 1, j + 1] - values[i + 1, j]) * v
    return float(low + (high - low) * u)


class GridLatency:
    """What solver and simulator ask for a step's time; also a `StepLatency`."""

    def __init__(self, grid: LatencyGrid, source: Source, relative_error: float) -> None:
        self.grid = grid
        self.source = source
        self.relative_error = relative_error  # expected |measured / predicted - 1| of one step

    def step_s(self, shape: StepShape) -> float:
        return self.grid.step_s(shape)

    def prefill_s(self, lengths: Iterable[int], cached: int = 0) -> float:
        """One step that prefills prompts of these lengths, each after `cached` tokens."""
        return self.step_s(StepShape.of([(cached, length) for length in lengths]))

    def decode_s(self, batch: int, context: float) -> float:
        """One step of `batch` requests that attend to `context` tokens on average."""
        return self.step_s(
            StepShape(num_decodes=batch, num_decode_context_tokens=round(batch * context))
        )


def composed_latency(
    spec: ModelSpec,
    gpu: Gpu,
    parallelism: Parallelism = ONE_GPU,
    framework: Framework | None = None,
) -> GridLatency:
    """Measured tables where `gpu` has them, else its roofline; raises for an impossible cut."""
    problem = spec.fits(parallelism)
    if problem is not None:
        raise LocalFault(f"{spec.name}: {problem}")
    framework = framework or find_framework()
    times = LayerTimes(spec, kernels_of(gpu), parallelism, framework)
    error = framework.relative_error if gpu.has_tables else ROOFLINE_ERROR
    if spec.experts is not None or spec.latent is not None:
        error = max(error, UNMEASURED_PART_ERROR)
    source = Source.MEASURED if gpu.has_tables else Source.ROOFLINE
    return GridLatency(_grid(times), source, error)


def _grid(times: LayerTimes) -> LatencyGrid:
    framework = times.framework
    head = times.head_s(DECODES)
    attention = times.decode_attention_s(DECODES[:, None], CONTEXTS[None, :])
    per_request = head - head[0] + framework.request_s * DECODES
    chunk, length = np.broadcast_arrays(CHUNKS[:, None], LENGTHS[None, :])
    pairs = chunk * (length + 1) / 2
    return LatencyGrid(
        fixed_s=framework.step_s + float(head[0]),
        prefill_fixed_s=framework.prefill_step_s,
        prompt_s=framework.prompt_s,
        prompt_token_s=framework.prompt_token_s,
        token_s=framework.token_s,
        reply_s=framework.reply_s,
        num_stages=times.parallelism.pp,
        tokens=TOKENS,
        linear_s=np.maximum.accumulate(times.linear_s(TOKENS)),
        chunks=CHUNKS,
        lengths=LENGTHS,
        pair_s=times.prefill_attention_s(chunk, length) / pairs,
        decodes=DECODES,
        contexts=CONTEXTS,
        decode_s=np.maximum.accumulate(attention + per_request[:, None], axis=0),
    )


# Memory and transfers.

MEMORY_SHARE = 0.9  # of device memory that engines use by default
RUNTIME_BYTES = 3.5 * 2**30  # context, libraries, communicators, CUDA graphs, activations


def kv_capacity_tokens(
    spec: ModelSpec,
    gpu: Gpu,
    parallelism: Parallelism = ONE_GPU,
    *,
    memory_share: float = MEMORY_SHARE,
    runtime_bytes: float = RUNTIME_BYTES,
    max_num_seqs: int = 0,
) -> int:
    """Tokens of KV that one instance holds; 0 when the weights alone do not fit.

    Sliding layers keep all positions, unless `max_num_seqs` is given: so many sequences then keep
    their windows or recurrent states besides.
    """
    free = gpu.memory_bytes * memory_share - runtime_bytes - spec.weight_bytes(parallelism)
    window = spec.kv_bytes(float(spec.sliding_window or 0))
    state = max_num_seqs * (window if spec.num_sliding_layers or spec.linear else 0.0)
    free -= state / (parallelism.tp * parallelism.pp * parallelism.attention_dp)
    per_token = spec.kv_bytes_per_gpu_token(parallelism, is_windowed=max_num_seqs > 0)
    return max(0, int(free / per_token)) * parallelism.attention_dp
