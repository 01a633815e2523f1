"""Measured kernel tables of one GPU type (NVIDIA aiconfigurator, Apache-2.0).

GEMM C[m,n] = A[m,k] B[k,n]; attention of one layer with head dimension 128 and bfloat16 KV, by
the head counts of one GPU; collectives by bytes. All times here are seconds.
"""

from collections.abc import Mapping
from functools import cache
from importlib import resources

import numpy as np

from placement.tables.interpolate import Array, cell, fill_corner, log_bilinear, log_interpolate

HEAD_DIM = 128  # of the attention tables
MEASURED_SYSTEMS = ("a100_sxm", "h100_sxm", "h200_sxm")
CUSTOM_ALL_REDUCE = "vllm_graph"  # inside a CUDA graph, as engines run it


@cache
def load_arrays(name: str) -> Mapping[str, Array]:
    """Arrays of `data/hardware/<name>.npz`, times in seconds."""
    path = resources.files("placement") / "data" / "hardware" / f"{name}.npz"
    with path.open("rb") as file, np.load(file) as packed:
        arrays = {key: packed[key].astype(np.float64) for key in packed.files}
    return {
        key.replace("latency_ms", "time_s"): array * 1e-3 if key.endswith("latency_ms") else array
        for key, array in arrays.items()
    }


class MeasuredTables:
    """The tables of one system, read by size."""

    def __init__(self, system: str) -> None:
        self.system = system
        self._arrays = load_arrays(system)
        self._context = self._attention("context", "isl", per_pair=True)
        self._decode = self._attention("decode", "kv_len", per_pair=False)

    @property
    def gemm_dtypes(self) -> tuple[str, ...]:
        return tuple(
            key.split("/")[1]
            for key in self._arrays
            if key.startswith("gemm/") and key.endswith("time_s")
        )

    def gemm_s(self, m: Array, n: float, k: float, dtype: str) -> Array:
        """Time of one GEMM for each `m`; `dtype` is bfloat16 or fp8 where measured."""
        axes = [self._arrays[f"gemm/{dtype}/{axis}"] for axis in ("n", "k", "m")]
        log_times = np.log(self._arrays[f"gemm/{dtype}/time_s"])
        i, u = cell(np.array(n), np.log(axes[0]))
        j, v = cell(np.array(k), np.log(axes[1]))
        corners = log_times[i : i + 2, j : j + 2]
        weights = np.array([[(1 - u) * (1 - v), (1 - u) * v], [u * (1 - v), u * v]])
        over_m = np.tensordot(weights, corners, axes=([0, 1], [0, 1]))
        times = log_interpolate(m, axes[2], over_m)
        return np.asarray(times * _beyond(n, axes[0]) * _beyond(k, axes[1]))

    def context_attention_s(
        self, tokens: Array, mean_length: Array, q_heads: float, kv_heads: float
    ) -> Array:
        """Causal attention of `tokens` prompt tokens in prompts of `mean_length`.

        A chunk after earlier tokens counts as a part of a longer prompt: its pairs are timed at
        the rate of that prompt's.
        """
        axes, log_times, heads = self._nearest(self._context, q_heads, kv_heads, by_query=True)
        pairs = tokens * (mean_length + 1) / 2
        batch = np.maximum(tokens / np.maximum(mean_length, 1.0), axes[0][0])
        rate = log_bilinear(batch, mean_length, axes, log_times)
        return rate * pairs * (q_heads / heads[0])

    def decode_attention_s(
        self, batch: Array, context: Array, q_heads: float, kv_heads: float
    ) -> Array:
        """One decode step of one layer: `batch` requests that attend to `context` tokens each."""
        axes, log_times, heads = self._nearest(self._decode, q_heads, kv_heads, by_query=False)
        times = log_bilinear(batch, context, axes, log_times)
        beyond = np.maximum(batch / axes[0][-1], 1) * np.maximum(context / axes[1][-1], 1)
        return np.asarray(times * beyond * (kv_heads / heads[1]))

    def collective_s(self, op: str, num_bytes: Array, num_gpus: int) -> Array:
        """An all_reduce, all_gather, reduce_scatter or alltoall inside one node."""
        size = next(n for n in (2, 4, 8) if n >= min(num_gpus, 8))
        nccl = self._collective("nccl", op, num_bytes, size)
        if op != "all_reduce":
            return nccl
        return np.minimum(nccl, self._collective(CUSTOM_ALL_REDUCE, op, num_bytes, size))

    def _collective(self, impl: str, op: str, num_bytes: Array, size: int) -> Array:
        key = f"collective/{impl}-{op}-{size}"
        times = np.log(self._arrays[f"{key}/time_s"])
        return log_interpolate(num_bytes, self._arrays[f"{key}/bytes"], times)

    def _attention(
        self, kind: str, length: str, *, per_pair: bool
    ) -> dict[tuple[int, int], tuple[tuple[Array, Array], Array]]:
        tables = {}
        for key in self._arrays:
            prefix, variant, axis = key.split("/")
            if prefix != kind or axis != "time_s":
                continue
            batch = self._arrays[f"{kind}/{variant}/batch_size"]
            lengths = self._arrays[f"{kind}/{variant}/{length}"]
            times = fill_corner(self._arrays[key], batch)
            if per_pair:
                times = times / (batch[:, None] * (lengths * (lengths + 1) / 2)[None, :])
            q_heads, kv_heads = (int(part) for part in variant.split("-"))
            tables[q_heads, kv_heads] = ((batch, lengths), np.log(times))
        return tables

    @staticmethod
    def _nearest(
        tables: dict[tuple[int, int], tuple[tuple[Array, Array], Array]],
        q_heads: float,
        kv_heads: float,
        *,
        by_query: bool,
    ) -> tuple[tuple[Array, Array], Array, tuple[int, int]]:
        """The measured head counts closest to these: query heads set compute, KV heads bytes."""
        weights = (1.0, 0.5) if by_query else (0.5, 1.0)

        def distance(heads: tuple[int, int]) -> tuple[float, tuple[int, int]]:
            far_q = abs(float(np.log(heads[0] / q_heads)))
            far_kv = abs(float(np.log(heads[1] / kv_heads)))
            return weights[0] * far_q + weights[1] * far_kv, heads

        heads = min(tables, key=distance)
        axes, log_times = tables[heads]
        return axes, log_times, heads


@cache
def measured_tables(system: str) -> MeasuredTables:
    """Loaded once a process: the arrays are read-only by convention."""
    return MeasuredTables(system)


def _beyond(size: float, axis: Array) -> float:
    return max(1.0, size / float(axis[-1]))
