"""The latency model: exact at measured points, bounded by rooflines, monotone, of stated source."""

import time
from itertools import pairwise

import numpy as np
import pytest

from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepShape
from placement.framework import Framework, find_framework, frameworks
from placement.hardware import find_gpu
from placement.latency import (
    Source,
    composed_latency,
    kv_capacity_tokens,
)
from placement.layer_times import LayerTimes
from placement.model_config import load_model, with_quantisation
from placement.model_spec import Parallelism
from placement.tables.kernels import MeasuredKernels, RooflineKernels, kernels_of
from placement.tables.measured import measured_tables

PLAIN = Framework(name="plain")
LLAMA_8B = load_model("meta-llama/Llama-3.1-8B")
LLAMA_70B = load_model("meta-llama/Llama-3.1-70B")
H100, A100, MI300X = find_gpu("h100"), find_gpu("a100"), find_gpu("mi300x")


def one(value: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([value])


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "ms"),
    [(1, 1024, 1024, "bfloat16", 0.004804), (4, 1024, 1024, "bfloat16", 0.007535)],
)
def test_gemm_table_gives_back_what_was_measured(
    m: int, n: int, k: int, dtype: str, ms: float
) -> None:
    times = measured_tables("a100_sxm").gemm_s(one(m), n, k, dtype)
    assert times[0] == pytest.approx(ms / 1e3, rel=1e-5)


def test_attention_tables_give_back_what_was_measured() -> None:
    tables = measured_tables("a100_sxm")
    context = tables.context_attention_s(one(32), one(32), 4, 1)
    assert context[0] == pytest.approx(0.01142e-3, rel=1e-5)
    decode = tables.decode_attention_s(one(1), one(256), 4, 1)
    assert decode[0] == pytest.approx(0.017797e-3, rel=1e-5)
    gather = tables.collective_s("all_gather", one(1024), 2)
    assert gather[0] == pytest.approx(0.00908e-3, rel=1e-5)


def test_reference_points_of_h100_are_read_off_the_tables() -> None:
    tables = measured_tables("h100_sxm")
    flops = 2 * 8192**3 / tables.gemm_s(one(8192), 8192, 8192, "bfloat16")[0]
    assert flops == pytest.approx(713e12, rel=0.01)
    kv_bytes = 64 * 4096 * 2 * 8 * 128 * 2
    rate = kv_bytes / tables.decode_attention_s(one(64), one(4096), 32, 8)[0]
    assert rate == pytest.approx(3037e9, rel=0.01)


def test_between_measured_sizes_times_lie_between_measured_times() -> None:
    tables = measured_tables("h100_sxm")
    low, middle, high = tables.gemm_s(np.array([1024.0, 1500.0, 2048.0]), 8192, 8192, "bfloat16")
    assert low < middle < high


def test_beyond_the_tables_times_grow_in_proportion() -> None:
    tables = measured_tables("h100_sxm")
    edge, twice = tables.gemm_s(np.array([16384.0, 32768.0]), 8192, 8192, "bfloat16")
    assert twice == pytest.approx(2 * edge)
    assert tables.gemm_s(one(16), 131072, 8192, "bfloat16")[0] == pytest.approx(
        2 * tables.gemm_s(one(16), 65536, 8192, "bfloat16")[0]
    )


def test_roofline_meets_its_two_limits() -> None:
    kernels = RooflineKernels(MI300X)
    small = kernels.gemm_s(one(1), 16384, 16384, "bfloat16", 2.0)[0]
    assert small == pytest.approx(2 * 16384**2 / (5300e9 * 0.75), rel=0.03)
    large = kernels.gemm_s(one(16384), 16384, 16384, "bfloat16", 2.0)[0]
    assert large == pytest.approx(2 * 16384**3 / (1307.4e12 * 0.65), rel=0.01)


def test_roofline_of_a_measured_gpu_is_close_to_its_tables() -> None:
    for gpu in (A100, H100, find_gpu("h200")):
        bare = gpu.model_copy(update={"tables": None})
        for cut in (Parallelism(tp=1), Parallelism(tp=4)):
            measured = composed_latency(LLAMA_8B, gpu, cut, PLAIN)
            roofline = composed_latency(LLAMA_8B, bare, cut, PLAIN)
            for shape in ((4, 2048), (64, 2048)):
                ratio = roofline.decode_s(*shape) / measured.decode_s(*shape)
                assert 0.55 < ratio < 1.4, (gpu.name, cut, shape)
            ratio = roofline.prefill_s([4096]) / measured.prefill_s([4096])
            assert 0.6 < ratio < 1.5


def test_decode_of_llama_70b_is_bounded_by_reading_its_weights() -> None:
    cut = Parallelism(tp=4)
    model = composed_latency(LLAMA_70B, H100, cut, PLAIN)
    floor = (LLAMA_70B.weight_bytes(cut) - 2 * 128256 * 8192 / 4) / 3350e9
    assert floor < model.decode_s(1, 16) < 1.6 * floor


def test_prefill_of_llama_70b_is_bounded_by_its_arithmetic() -> None:
    model = composed_latency(LLAMA_70B, H100, Parallelism(tp=4), PLAIN)
    rest = LLAMA_70B.embedding_params + LLAMA_70B.lm_head_params + LLAMA_70B.norm_params
    floor = 8192 * 2 * (LLAMA_70B.num_params - rest) / 4 / 989e12
    assert floor < model.prefill_s([8192]) < 2.2 * floor


@pytest.mark.parametrize("gpu", ["a100", "h100", "h200", "mi300x", "l40s", "b200"])
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-30B-A3B", "gpt-oss-120b", "DeepSeek-V3"])
def test_more_work_never_takes_less_time(gpu: str, name: str) -> None:
    model = composed_latency(load_model(name), find_gpu(gpu), Parallelism(tp=8))
    batches = [model.decode_s(batch, 2000) for batch in range(1, 1500, 7)]
    contexts = [model.decode_s(32, context) for context in range(20, 60_000, 700)]
    prompts = [model.prefill_s([length]) for length in range(1, 20_000, 211)]
    for times in (batches, contexts, prompts):
        assert np.all(np.diff(times) >= -0.02 * np.array(times[:-1]))
        assert times[-1] > times[0]


def test_tp_lowers_time_until_communication_eats_it() -> None:
    decode = [
        composed_latency(LLAMA_70B, H100, Parallelism(tp=tp), PLAIN).decode_s(16, 2000)
        for tp in (1, 2, 4, 8)
    ]
    assert decode == sorted(decode, reverse=True)
    gains = [before / after for before, after in pairwise(decode)]
    assert gains[-1] == min(gains) < 1.65


def test_all_reduce_across_nodes_costs_more_than_inside_one() -> None:
    kernels = kernels_of(H100)
    size = one(1e6)
    assert kernels.all_reduce_s(size, 16)[0] > 1.2 * kernels.all_reduce_s(size, 8)[0]


def test_pipeline_stages_keep_the_time_and_add_hops() -> None:
    flat = composed_latency(LLAMA_70B, H100, Parallelism(tp=2), PLAIN)
    piped = composed_latency(LLAMA_70B, H100, Parallelism(tp=2, pp=4), PLAIN)
    assert flat.decode_s(8, 1000) < piped.decode_s(8, 1000) < flat.decode_s(8, 1000) + 1e-3
    assert piped.grid.num_stages == 4


def test_fp8_is_faster_than_bf16_and_fp8_kv_than_bf16_kv() -> None:
    fp8 = with_quantisation(LLAMA_70B, weights="fp8")
    both = with_quantisation(LLAMA_70B, weights="fp8", kv="fp8")
    cut = Parallelism(tp=4)
    times = [
        composed_latency(spec, H100, cut, PLAIN).decode_s(64, 8000)
        for spec in (LLAMA_70B, fp8, both)
    ]
    assert times == sorted(times, reverse=True)


def test_int4_saves_bytes_but_no_arithmetic() -> None:
    int4 = with_quantisation(LLAMA_70B, weights="int4")
    plain = composed_latency(LLAMA_70B, H100, Parallelism(tp=2), PLAIN)
    packed = composed_latency(int4, H100, Parallelism(tp=2), PLAIN)
    assert packed.decode_s(1, 100) < 0.5 * plain.decode_s(1, 100)
    assert packed.prefill_s([8192]) == pytest.approx(plain.prefill_s([8192]), rel=0.03)


def test_grid_is_the_sum_of_its_kernels_at_its_knots() -> None:
    cut = Parallelism(tp=2)
    times = LayerTimes(LLAMA_8B, MeasuredKernels(H100), cut, PLAIN)
    model = composed_latency(LLAMA_8B, H100, cut, PLAIN)
    expected = times.linear_s(one(32)) + times.decode_attention_s(one(32), one(1024))
    assert model.decode_s(32, 1024) == pytest.approx(float((expected + times.head_s(one(32)))[0]))
    shape = StepShape.of(prefill_chunks=[(0, 2048)], decode_contexts=[1024] * 32)
    mixed = model.step_s(shape)
    assert model.decode_s(32, 1024) < mixed < model.decode_s(32, 1024) + model.prefill_s([2048])


def test_a_chunk_after_earlier_tokens_costs_its_share_of_the_whole() -> None:
    model = composed_latency(LLAMA_8B, H100, Parallelism(), PLAIN)
    chunks = sum(
        model.step_s(StepShape.of(prefill_chunks=[(start, 2048)]))
        for start in range(0, 16384, 2048)
    )
    whole = model.prefill_s([16384])
    assert 0.9 * whole < chunks < 1.3 * whole


def test_every_model_says_its_source_and_error() -> None:
    models = [
        composed_latency(LLAMA_8B, H100),
        composed_latency(LLAMA_8B, MI300X),
        composed_latency(load_model("Mixtral-8x7B-v0.1"), H100, Parallelism(tp=2)),
    ]
    assert [model.source for model in models] == [
        Source.MEASURED,
        Source.ROOFLINE,
        Source.MEASURED,
    ]
    errors = [model.relative_error for model in models]
    assert errors[1] > errors[0] > 0
    assert errors[2] > errors[0]


def test_frameworks_fall_back_to_the_less_specific() -> None:
    assert find_framework("vllm", "fp8", "h100_sxm").name == "vllm-fp8-h100_sxm"
    assert find_framework("vllm", "fp8", "moon").name == "vllm"
    assert find_framework().name == "pdserve"
    with pytest.raises(LocalFault, match="known: pdserve, sglang, trtllm, vllm"):
        find_framework("tgi")


def test_fitted_corrections_stay_near_one() -> None:
    for framework in frameworks().values():
        if "moe" not in framework.name:
            assert 0.75 < framework.gemm_scale < 1.3, framework.name
            assert 0.75 < framework.prefill_scale < 1.5, framework.name


def test_impossible_cuts_are_refused() -> None:
    with pytest.raises(LocalFault, match="TP 3"):
        composed_latency(LLAMA_8B, H100, Parallelism(tp=3))


def test_kv_capacity_is_what_memory_leaves() -> None:
    free = 80 * 2**30 * 0.9 - 3.5 * 2**30 - LLAMA_8B.weight_bytes()
    assert kv_capacity_tokens(LLAMA_8B, H100) == int(free / 131_072)
    assert kv_capacity_tokens(LLAMA_70B, H100) == 0
    assert kv_capacity_tokens(LLAMA_70B, H100, Parallelism(tp=4)) > 100_000


def test_a_grid_takes_well_under_50_ms_and_is_deterministic() -> None:
    composed_latency(LLAMA_70B, H100, Parallelism(tp=4))
    start = time.process_time()
    for _ in range(10):
        model = composed_latency(LLAMA_70B, H100, Parallelism(tp=4))
    assert (time.process_time() - start) / 10 < 0.05
    again = composed_latency(LLAMA_70B, H100, Parallelism(tp=4))
    assert np.array_equal(model.grid.decode_s, again.grid.decode_s)
