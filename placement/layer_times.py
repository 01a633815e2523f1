"""A step's time, composed kernel by kernel from a `ModelSpec` on one cut of GPUs.

Everything is a function of arrays, so that a whole grid costs a handful of numpy calls:
`linear_s` of the tokens in a step, `prefill_attention_s` and `decode_attention_s` of what they
attend to, `head_s` of the requests that sample. The four add up to the step's device time.
"""

import numpy as np

from placement.framework import Framework
from placement.model_spec import Experts, LatentAttention, ModelSpec, Parallelism
from placement.tables.interpolate import Array
from placement.tables.kernels import LAUNCH_S, KernelTimes, RooflineKernels

GROUPED_FLOPS_SHARE = 0.45  # grouped expert GEMMs, of the peak
GROUPED_MEMORY_SHARE = 0.65
GROUPED_LAUNCHES = 8  # route, sort, gather, two GEMMs, activation, scatter, sum
MIN_EXPERT_ROWS = 16.0  # rows that a grouped GEMM pads an expert's tokens to
EXPERT_COLUMNS = 64.0  # columns that a grouped GEMM pads a share of an expert to
LATENT_FLOPS_SHARE = 0.45  # absorbed MLA decode kernels, of the bfloat16 peak
LARGE_STEP_TOKENS = 256.0  # from here on arithmetic, not weight reading, sets a GEMM's time


class LayerTimes:
    """Device time of a whole model on one GPU of each of its `pp` stages, summed over stages."""

    def __init__(
        self,
        spec: ModelSpec,
        kernels: KernelTimes,
        parallelism: Parallelism,
        framework: Framework,
    ) -> None:
        self.spec = spec
        self.kernels = kernels
        self.parallelism = parallelism
        self.framework = framework
        self.roofline = RooflineKernels(kernels.gpu)

    # Per token.

    def linear_s(self, tokens: Array) -> Array:
        """Matrices, norms, activations and collectives for `tokens` tokens in the step."""
        spec = self.spec
        local = tokens / self.parallelism.attention_dp
        softmax_layers = spec.num_layers - spec.num_linear_layers
        time = softmax_layers * self._projections_s(local)
        if spec.linear is not None:
            time = time + spec.num_linear_layers * self._linear_attention_s(local)
        time = time + spec.num_dense_layers * self._dense_mlp_s(tokens)
        if spec.experts is not None:
            time = time + spec.num_moe_layers * self._moe_s(tokens, spec.experts)
        time = time + spec.num_layers * (self._elementwise_s(local) + self.framework.layer_s)
        scaled = time * self._scale(tokens)
        reduce = self._communication_s(tokens)
        return np.asarray(scaled + reduce * self.framework.comm_scale + self._stages_s(tokens))

    def head_s(self, requests: Array) -> Array:
        """The LM head for the requests that sample."""
        spec = self.spec
        columns = spec.vocab_size / self.parallelism.tp
        precision = spec.precision.embedding_bytes
        local = np.maximum(requests / self.parallelism.attention_dp, 1.0)
        return self._gemm_s(local, columns, spec.hidden_size, "bfloat16", precision)

    def _gemm_s(self, m: Array, n: float, k: float, dtype: str, weight_bytes: float) -> Array:
        return self.kernels.gemm_s(np.maximum(m, 1.0), n, k, dtype, weight_bytes)

    def _linear_gemm_s(self, m: Array, n: float, k: float) -> Array:
        precision = self.spec.precision
        return self._gemm_s(m, n, k, precision.linear_compute, precision.linear_bytes)

    def _projections_s(self, tokens: Array) -> Array:
        spec, tp = self.spec, self.parallelism.tp
        if spec.latent is not None:
            return self._latent_projections_s(tokens, spec.latent)
        query = spec.num_heads * spec.head_dim / tp
        kv = 2 * spec.kv_heads_per_gpu(tp) * spec.head_dim
        gate = query if spec.attention_gate else 0
        into = self._linear_gemm_s(tokens, query + gate + kv, spec.hidden_size)
        return into + self._linear_gemm_s(tokens, spec.hidden_size, query)

    def _latent_projections_s(self, tokens: Array, latent: LatentAttention) -> Array:
        spec, tp = self.spec, self.parallelism.tp
        qk_dim = latent.nope_head_dim + latent.rope_head_dim
        heads = spec.num_heads / tp
        down = latent.q_lora_rank + latent.kv_lora_rank + latent.rope_head_dim
        query_in = latent.q_lora_rank or spec.hidden_size
        absorbed = latent.kv_lora_rank * (latent.nope_head_dim + latent.v_head_dim)
        time = self._linear_gemm_s(tokens, down, spec.hidden_size)
        time = time + self._linear_gemm_s(tokens, heads * qk_dim, query_in)
        time = time + self._gemm_s(tokens, heads, absorbed, "bfloat16", 2.0)
        return time + self._linear_gemm_s(tokens, spec.hidden_size, heads * latent.v_head_dim)

    def _linear_attention_s(self, tokens: Array) -> Array:
        linear = self.spec.linear
        assert linear is not None
        tp, hidden = self.parallelism.tp, self.spec.hidden_size
        values = linear.num_value_heads * linear.value_head_dim / tp
        keys = linear.num_key_heads * linear.key_head_dim / tp
        time = self._linear_gemm_s(tokens, 2 * keys + 2 * values, hidden)
        time = time + self._linear_gemm_s(tokens, hidden, values)
        state = linear.state_bytes() / linear.num_layers / tp
        return time + 4 * LAUNCH_S + np.minimum(tokens, 256) * 2 * state / self.roofline.bytes_per_s

    def _dense_mlp_s(self, tokens: Array) -> Array:
        spec, gpus = self.spec, self.parallelism.stage_gpus
        width = spec.intermediate_size / gpus
        if width < 1:
            return np.zeros_like(tokens)
        columns = (spec.num_mlp_matrices - 1) * width
        up = self._linear_gemm_s(tokens, columns, spec.hidden_size)
        return up + self._linear_gemm_s(tokens, spec.hidden_size, width)

    def _moe_s(self, tokens: Array, experts: Experts) -> Array:
        """Grouped GEMMs on the busiest GPU: weights of every expert touched, rows padded to a tile.

        Of the stage's GPUs `ep` hold whole experts, and the rest share an expert's columns, which
        are padded to a tile too: narrow shares waste arithmetic, whole experts are never evenly
        asked.
        """
        spec, ep = self.spec, self.parallelism.ep
        gpu, precision = self.kernels.gpu, spec.precision
        share = experts.experts_per_token / experts.num_experts
        touched = experts.num_experts * (1.0 - (1.0 - share) ** tokens)
        sent = tokens * experts.experts_per_token
        held = experts.num_experts / ep
        touched = np.minimum(_busiest(touched, ep, held), sent)
        sent = np.minimum(_busiest(sent, ep), tokens * min(experts.experts_per_token, held))
        rows = np.maximum(sent, touched * MIN_EXPERT_ROWS)
        columns = experts.intermediate_size * ep / self.parallelism.stage_gpus
        padded = np.ceil(columns / EXPERT_COLUMNS) * EXPERT_COLUMNS / columns
        params = spec.expert_params * ep / self.parallelism.stage_gpus
        moved = touched * params * precision.expert_bytes
        flops = 2.0 * rows * params * padded
        compute = flops / (gpu.flops(precision.expert_compute) * GROUPED_FLOPS_SHARE)
        memory = moved / (gpu.memory_gb_per_s * 1e9 * GROUPED_MEMORY_SHARE)
        time = GROUPED_LAUNCHES * LAUNCH_S + np.maximum(compute, memory)
        time = time + self._gemm_s(tokens, experts.num_experts, spec.hidden_size, "bfloat16", 2.0)
        if experts.shared_intermediate_size:
            width = max(experts.shared_intermediate_size / self.parallelism.tp, 1.0)
            up = self._linear_gemm_s(tokens, 2 * width, spec.hidden_size)
            time = time + up + self._linear_gemm_s(tokens, spec.hidden_size, width)
        return np.asarray(time)

    def _elementwise_s(self, tokens: Array) -> Array:
        """Two norms with residuals, rotary embedding, activation; fp8 also writes its inputs."""
        spec, tp = self.spec, self.parallelism.tp
        norms = 8 * spec.hidden_size * 2
        rotary = 2 * (spec.num_heads / tp + 2) * spec.head_dim * 2
        width = spec.experts.intermediate_size if spec.experts else spec.intermediate_size
        activation = 3 * width / tp * 2
        quantise = 3 * spec.hidden_size if spec.precision.linear_compute == "fp8" else 0
        moved = tokens * (norms + rotary + activation + quantise)
        num_kernels = 6 if spec.precision.linear_compute == "fp8" else 4
        return num_kernels * LAUNCH_S * 0.6 + moved / self.roofline.bytes_per_s

    def _communication_s(self, tokens: Array) -> Array:
        """Two all-reduces a layer; with data-parallel attention, a dispatch and a combine."""
        spec, cut = self.spec, self.parallelism
        num_bytes = tokens * spec.hidden_size * 2.0
        time = np.zeros_like(tokens)
        if cut.tp > 1:
            local = num_bytes / cut.attention_dp
            time = time + 2 * spec.num_layers * self.kernels.all_reduce_s(local, cut.tp)
        if cut.attention_dp > 1:
            reduce = self.kernels.all_reduce_s(num_bytes, cut.stage_gpus)
            time = time + spec.num_layers * reduce
        return time

    def _stages_s(self, tokens: Array) -> Array:
        hops = self.parallelism.pp - 1
        gpu = self.kernels.gpu
        link = gpu.intra_node_gb_per_s * 1e9 * self.roofline.link_share
        return hops * (1e-5 + tokens * self.spec.hidden_size * 2.0 / link)

    def _scale(self, tokens: Array) -> Array:
        """From the decode correction to the prefill one as steps grow."""
        weight = tokens / (tokens + LARGE_STEP_TOKENS)
        low, high = self.framework.gemm_scale, self.framework.prefill_scale
        return np.asarray(low + (high - low) * weight)

    # Per attended token.

    def prefill_attention_s(self, tokens: Array, mean_length: Array) -> Array:
        """Attention of prompts of `mean_length` (twice the pairs per token, less one)."""
        spec, cut = self.spec, self.parallelism
        if spec.latent is not None:
            pairs = tokens * (mean_length + 1) / 2
            flops = pairs * spec.attention_flops_per_pair() / cut.stage_gpus
            rate = self.kernels.gpu.flops("bfloat16") * LATENT_FLOPS_SHARE
            return np.asarray(spec.num_layers * LAUNCH_S + flops / rate)
        heads = (spec.num_heads / cut.tp, float(spec.kv_heads_per_gpu(cut.tp)))
        local = np.maximum(tokens / cut.attention_dp, 1.0)
        full = self.kernels.context_attention_s(local, mean_length, heads, spec.head_dim)
        time = spec.num_full_layers * full
        if spec.num_sliding_layers and spec.sliding_window:
            short = np.minimum(mean_length, 2.0 * spec.sliding_window)
            window = self.kernels.context_attention_s(local, short, heads, spec.head_dim)
            time = time + spec.num_sliding_layers * window
        return np.asarray(time * self.framework.prefill_scale)

    def decode_attention_s(self, requests: Array, context: Array) -> Array:
        """One token of each of `requests` that attend to `context` tokens each."""
        spec, cut = self.spec, self.parallelism
        local = np.maximum(requests / cut.attention_dp, 1.0)
        if spec.latent is not None:
            return self._latent_decode_s(local, context, spec.latent)
        heads = (spec.num_heads / cut.tp, float(spec.kv_heads_per_gpu(cut.tp)))
        sizes = (heads, spec.head_dim, spec.precision.kv_bytes)
        full = self.kernels.decode_attention_s(local, context, *sizes)
        time = spec.num_full_layers * full
        if spec.num_sliding_layers and spec.sliding_window:
            short = np.minimum(context, float(spec.sliding_window))
            window = self.kernels.decode_attention_s(local, short, *sizes)
            time = time + spec.num_sliding_layers * window
        return np.asarray(time * self.framework.attention_scale)

    def _latent_decode_s(self, requests: Array, context: Array, latent: LatentAttention) -> Array:
        """Absorbed form: every head reads the same latent, so bytes do not shrink with TP."""
        spec = self.spec
        width = latent.kv_lora_rank + latent.rope_head_dim
        attended = requests * context
        memory = attended * width * spec.precision.kv_bytes / self.roofline.bytes_per_s
        heads = spec.num_heads / self.parallelism.tp
        flops = 2.0 * attended * heads * (width + latent.kv_lora_rank)
        compute = flops / (self.kernels.gpu.flops("bfloat16") * LATENT_FLOPS_SHARE)
        per_layer = 3 * LAUNCH_S + np.maximum(memory, compute)
        return np.asarray(spec.num_layers * per_layer * self.framework.attention_scale)


def _busiest(total: Array, num: int, most: float = np.inf) -> Array:
    """The greatest of `num` shares of `total` that chance spreads evenly, each at most `most`.

    A share's mean and deviation, and the mean of the greatest of `num` normal ones.
    """
    if num == 1:
        return total
    mean = total / num
    deviation = np.sqrt(mean * np.maximum(1.0 - mean / most, 0.0))
    return np.asarray(np.minimum(mean + deviation * np.sqrt(2.0 * np.log(num)), most))
