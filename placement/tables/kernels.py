"""Times of single kernels on one GPU: from measurements, or from the datasheet's roofline."""

import numpy as np

from placement.hardware import Gpu
from placement.tables.interpolate import Array
from placement.tables.measured import HEAD_DIM, MeasuredTables, measured_tables

LAUNCH_S = 2.5e-6  # floor of a kernel inside a CUDA graph (smallest GEMMs and all-reduces measured)
INTER_NODE_LATENCY_S = 1.5e-5


class RooflineKernels:
    """The datasheet's limits, each reached to a stated share.

    The shares are what the measured tables of A100, H100 and H200 reach at large sizes (reference
    points in docs/latency-model.md), rounded down: other GPUs' software is rarely better.
    """

    gemm_flops_share = 0.65
    memory_share = 0.75
    attention_flops_share = 0.45
    link_share = 0.75

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    @property
    def bytes_per_s(self) -> float:
        return self.gpu.memory_gb_per_s * 1e9 * self.memory_share

    def gemm_s(self, m: Array, n: float, k: float, dtype: str, weight_bytes: float) -> Array:
        compute = 2.0 * m * n * k / (self.gpu.flops(dtype) * self.gemm_flops_share)
        moved = n * k * weight_bytes + 2.0 * m * (n + k)
        return np.asarray(LAUNCH_S + np.maximum(compute, moved / self.bytes_per_s))

    def context_attention_s(
        self, tokens: Array, mean_length: Array, heads: tuple[float, float], head_dim: int
    ) -> Array:
        pairs = tokens * (mean_length + 1) / 2
        flops = 4.0 * pairs * heads[0] * head_dim
        rate = self.gpu.flops("bfloat16") * self.attention_flops_share
        return np.asarray(2 * LAUNCH_S + flops / rate)

    def decode_attention_s(
        self,
        batch: Array,
        context: Array,
        heads: tuple[float, float],
        head_dim: int,
        kv_bytes: float,
    ) -> Array:
        moved = batch * context * 2 * heads[1] * head_dim * kv_bytes
        return np.asarray(2 * LAUNCH_S + moved / self.bytes_per_s)

    def all_reduce_s(self, num_bytes: Array, num_gpus: int) -> Array:
        """A ring inside a node; beyond it, a second ring between nodes."""
        inside = min(num_gpus, self.gpu.gpus_per_node)
        link = self.gpu.intra_node_gb_per_s * 1e9 * self.link_share
        ring = 2.0 * (inside - 1) / inside * num_bytes / link
        times = 2 * LAUNCH_S + LAUNCH_S * np.log2(max(inside, 2)) + ring
        return np.asarray(times + _between_nodes(self.gpu, num_bytes, num_gpus))


class MeasuredKernels:
    """Measured tables; what they lack (4-bit GEMMs) comes from the roofline of the same GPU."""

    def __init__(self, gpu: Gpu) -> None:
        assert gpu.tables is not None
        self.gpu = gpu
        self.tables: MeasuredTables = measured_tables(gpu.tables)
        self.roofline = RooflineKernels(gpu)

    def gemm_s(self, m: Array, n: float, k: float, dtype: str, weight_bytes: float) -> Array:
        """Weights narrower than their arithmetic (int4 on bf16) save bytes, not operations."""
        if dtype not in self.tables.gemm_dtypes:
            dtype = "bfloat16"
        times = self.tables.gemm_s(m, n, k, dtype)
        usual_bytes = 1.0 if dtype == "fp8" else 2.0
        if weight_bytes > 0.75 * usual_bytes:
            return times
        narrow = self.roofline.gemm_s(m, n, k, dtype, weight_bytes)
        wide = self.roofline.gemm_s(m, n, k, dtype, usual_bytes)
        return times * narrow / wide

    def context_attention_s(
        self, tokens: Array, mean_length: Array, heads: tuple[float, float], head_dim: int
    ) -> Array:
        times = self.tables.context_attention_s(tokens, mean_length, *heads)
        return times * (head_dim / HEAD_DIM)

    def decode_attention_s(
        self,
        batch: Array,
        context: Array,
        heads: tuple[float, float],
        head_dim: int,
        kv_bytes: float,
    ) -> Array:
        """Narrower KV is read as a shorter context of the measured width: the bytes are equal."""
        same_bytes = context * (kv_bytes / 2.0) * (head_dim / HEAD_DIM)
        return self.tables.decode_attention_s(batch, same_bytes, *heads)

    def all_reduce_s(self, num_bytes: Array, num_gpus: int) -> Array:
        inside = self.tables.collective_s("all_reduce", num_bytes, num_gpus)
        return inside + _between_nodes(self.gpu, num_bytes, num_gpus)


KernelTimes = MeasuredKernels | RooflineKernels
"""Seconds of kernels; arrays of sizes broadcast."""


def kernels_of(gpu: Gpu) -> KernelTimes:
    """Measured tables where the GPU has them."""
    return MeasuredKernels(gpu) if gpu.has_tables else RooflineKernels(gpu)


def _between_nodes(gpu: Gpu, num_bytes: Array, num_gpus: int) -> Array:
    """The second level of a two-level all-reduce: every GPU carries its share between nodes."""
    num_nodes = -(-num_gpus // gpu.gpus_per_node)
    if num_nodes == 1:
        return np.zeros_like(num_bytes)
    share = num_bytes / gpu.gpus_per_node
    link = gpu.inter_node_gb_per_s * 1e9 * RooflineKernels.link_share
    ring = 2.0 * (num_nodes - 1) / num_nodes * share / link
    return np.asarray(INTER_NODE_LATENCY_S * num_nodes + ring)
