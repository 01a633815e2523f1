"""Expert parallelism, sliding windows and storage, as plans count them."""

import numpy as np
import pytest

from placement.hardware import find_gpu
from placement.latency import MEMORY_SHARE, RUNTIME_BYTES, composed_latency, kv_capacity_tokens
from placement.layer_times import _busiest
from placement.model_config import load_model, with_quantisation
from placement.model_spec import Parallelism

MIXTRAL = load_model("mistralai/Mixtral-8x7B-v0.1")
QWEN_MOE = load_model("Qwen/Qwen3-30B-A3B")
H200 = find_gpu("h200_sxm")


def test_kv_in_fp8_leaves_the_weights_as_the_config_says() -> None:
    deepseek = load_model("deepseek-ai/DeepSeek-V3")
    changed = with_quantisation(deepseek, kv="fp8")
    assert changed.weight_bytes() == deepseek.weight_bytes() < 1.01 * deepseek.num_params
    assert changed.kv_bytes_per_token() == deepseek.kv_bytes_per_token() / 2


def test_sliding_layers_keep_all_positions_unless_windows_are_counted() -> None:
    mistral, l40s = load_model("mistralai/Mistral-7B-v0.1"), find_gpu("l40s")
    free = l40s.memory_bytes * MEMORY_SHARE - RUNTIME_BYTES - mistral.weight_bytes()
    assert kv_capacity_tokens(mistral, l40s) == int(free / (32 * 2 * 8 * 128 * 2))
    gpt_oss = load_model("openai/gpt-oss-120b")
    windowed = kv_capacity_tokens(gpt_oss, H200, max_num_seqs=1)
    assert windowed == pytest.approx(2 * kv_capacity_tokens(gpt_oss, H200), rel=0.01)


def test_one_token_waits_for_a_whole_expert_where_experts_are_not_cut() -> None:
    cut = composed_latency(MIXTRAL, H200, Parallelism(tp=8)).decode_s(1, 1000)
    whole = composed_latency(MIXTRAL, H200, Parallelism(tp=8, ep=8)).decode_s(1, 1000)
    # Two experts of 2 x 8th each, against one of the two whole: 3/4 of an expert a layer more.
    expert_s = 2 * MIXTRAL.expert_params / (H200.memory_gb_per_s * 1e9 * 0.65)
    assert whole - cut == pytest.approx(0.75 * expert_s * 32, rel=0.1)


def test_narrow_experts_read_long_prompts_faster_whole() -> None:
    cut = composed_latency(QWEN_MOE, H200, Parallelism(tp=8)).prefill_s([8192])
    whole = composed_latency(QWEN_MOE, H200, Parallelism(tp=8, ep=8)).prefill_s([8192])
    assert 0.8 * cut < whole < 0.98 * cut


def test_large_batches_touch_all_experts_wherever_they_are() -> None:
    cut = composed_latency(MIXTRAL, H200, Parallelism(tp=8)).decode_s(256, 1000)
    whole = composed_latency(MIXTRAL, H200, Parallelism(tp=8, ep=8)).decode_s(256, 1000)
    assert whole == pytest.approx(cut, rel=0.02)


def test_busiest_share_is_near_the_greatest_of_random_ones() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(4096, [1 / 8] * 8, size=2000).max(axis=1).mean()
    assert float(_busiest(np.array([4096.0]), 8)[0]) == pytest.approx(drawn, rel=0.03)
    assert float(_busiest(np.array([7.0]), 1)[0]) == 7.0
    assert float(_busiest(np.array([60.0]), 8, 8.0)[0]) <= 8.0
