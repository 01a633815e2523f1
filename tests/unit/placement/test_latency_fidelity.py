"""The fidelity bench: its loop keeps time by the grid, and it keeps its promise on a sample."""

import numpy as np
import pytest

pytest.importorskip("numba")

from bench.latency_fidelity.closed_loop import (
    SGLANG,
    TRTLLM,
    VLLM,
    grid_arrays,
    serve,
    step_s,
)
from bench.latency_fidelity.predict import predict
from bench.latency_fidelity.rows import read_runs
from pdserve.domain.latency import StepCoefficients, StepShape
from placement.hardware import find_gpu
from placement.latency import composed_latency, fitted_latency
from placement.model_config import load_model

CONSTANT = fitted_latency(
    StepCoefficients(
        fixed_s=0.01,
        prefill_token_s=0.001,
        prefill_attention_s=0.0,
        decode_token_s=0.0,
        decode_context_token_s=0.0,
    )
)
NO_LIMITS = (1e9, 1e9, 1e9, 1e9)


def test_compiled_step_equals_the_grids() -> None:
    grid = composed_latency(load_model("Llama-3.1-8B"), find_gpu("h100")).to_grid()
    arrays = grid_arrays(grid)
    for chunks, decodes in (
        ([(0, 700)], []),
        ([], [100, 2000]),
        ([(512, 512)], [77] * 40),
        ([(0, 5)], [900_000] * 5000),
    ):
        shape = StepShape.of(chunks, decodes)
        compiled = step_s(
            arrays,
            shape.num_prefill_tokens,
            float(shape.num_prefill_pairs),
            shape.num_decodes,
            float(shape.num_decode_context_tokens),
        )
        assert compiled == pytest.approx(grid.step_s(shape), rel=1e-12)


@pytest.mark.parametrize("rule", [VLLM, SGLANG, TRTLLM])
def test_one_client_waits_for_prefill_and_then_a_step_a_token(rule: int) -> None:
    prompts, outputs = np.full(3, 100), np.full(3, 11)
    ttft, tpot = serve(grid_arrays(CONSTANT.grid), rule, NO_LIMITS, prompts, outputs, 1)
    assert ttft == pytest.approx([0.11] * 3)
    assert tpot == pytest.approx([0.01] * 3)


def test_prompts_first_delay_decodes_and_mixed_steps_share_them() -> None:
    prompts, outputs = np.full(2, 100), np.full(2, 11)
    limits = (100.0, 1e9, 1e9, 1e9)  # one prompt a step
    arrays = grid_arrays(CONSTANT.grid)
    ttft, tpot = serve(arrays, SGLANG, limits, prompts, outputs, 2)
    assert ttft == pytest.approx([0.11, 0.22])
    assert tpot == pytest.approx([(0.11 + 10 * 0.01) / 10, 0.01])
    _, mixed = serve(arrays, TRTLLM, (101.0, 1e9, 1e9, 1e9), prompts, outputs, 2)
    assert mixed[0] == pytest.approx((0.11 + 9 * 0.01) / 10)


def test_a_full_cache_makes_requests_wait() -> None:
    prompts, outputs = np.full(4, 100), np.full(4, 10)
    arrays = grid_arrays(CONSTANT.grid)
    free, _ = serve(arrays, TRTLLM, NO_LIMITS, prompts, outputs, 4)
    full, _ = serve(arrays, TRTLLM, (1e9, 120.0, 1e9, 1e9), prompts, outputs, 4)
    assert free == pytest.approx([0.41] * 4)
    assert full == pytest.approx([0.11, 0.31, 0.51, 0.71])


def test_a_sample_of_dense_runs_is_predicted_within_the_promise() -> None:
    runs = [run for run in read_runs() if run.is_dense and not run.is_disaggregated][::5]
    predicted = np.array([predict(run) for run in runs])
    measured = np.array([(run.ttft_s, run.tpot_s) for run in runs])
    ttft_error, tpot_error = np.median(np.abs(predicted / measured - 1), axis=0)
    assert tpot_error < 0.10
    assert ttft_error < 0.25
