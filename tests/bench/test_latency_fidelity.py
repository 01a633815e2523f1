"""The fidelity bench: its loop keeps time by the grid, and it keeps its promise on a sample."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from bench.latency_fidelity import run as fidelity
from bench.latency_fidelity.closed_loop import (
    SGLANG,
    TRTLLM,
    VLLM,
    grid_arrays,
    serve,
    step_s,
)
from bench.latency_fidelity.engines import Sweep
from bench.latency_fidelity.load import found_tokens, num_requests
from bench.latency_fidelity.predict import predict, predict_by_planner
from bench.latency_fidelity.rows import Run, read_runs
from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepShape
from placement.hardware import find_gpu
from placement.latency import LatencyGrid, composed_latency
from placement.model_config import load_model

UNIT = np.array([0.0, 1.0])
CONSTANT = LatencyGrid(  # 10 ms a step and 1 ms for each prompt token
    fixed_s=0.01,
    prefill_fixed_s=0.0,
    num_stages=1,
    tokens=UNIT,
    linear_s=0.001 * UNIT,
    chunks=UNIT,
    lengths=UNIT,
    pair_s=np.zeros((2, 2)),
    decodes=UNIT,
    contexts=UNIT,
    decode_s=np.array([[0.0, 0.0], [-0.001, -0.001]]),  # a decode's token is none of a prompt
)
NO_LIMITS = (1e9, 1e9, 1e9, 1e9)
AGGREGATED = {
    "id": "a",
    "system": "h200_sxm",
    "model_path": "meta-llama/Llama-3.1-8B-Instruct",
    "backend": "vllm",
    "backend_version": "0.12.0",
    "precision": "fp8",
    "mode": "agg",
    "isl": "2000",
    "osl": "100",
    "concurrency": "64.0",
    "batch_size": "64.0",
    "tp_size": "1.0",
    "silicon_ttft_ms": "120.0",
    "silicon_tpot_ms": "10.0",
}
DISAGGREGATED = AGGREGATED | {
    "mode": "disagg",
    "concurrency": "",
    "batch_size": "",
    "tp_size": "",
    "prefill_num_workers": "2.0",
    "prefill_tp_size": "1.0",
    "decode_num_workers": "3.0",
    "decode_tp_size": "2.0",
    "decode_batch_size": "8.0",
}


def write_csv(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, fieldnames=[*DISAGGREGATED, "attention_dp_size"], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def one_run(path: Path, row: dict[str, str]) -> Run:
    runs, refused = read_runs(write_csv(path / "rows.csv", row))
    assert refused == []
    return runs[0]


def nothing_found(prompts: np.ndarray) -> np.ndarray:
    return np.zeros_like(prompts)


def test_compiled_step_equals_the_grids() -> None:
    grid = composed_latency(load_model("Llama-3.1-8B"), find_gpu("h100")).grid
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
    arrays, found = grid_arrays(CONSTANT), nothing_found(prompts)
    ttft, tpot = serve(arrays, rule, NO_LIMITS, prompts, found, outputs, 1)
    assert ttft == pytest.approx([0.11] * 3)
    assert tpot == pytest.approx([0.01] * 3)


@pytest.mark.parametrize("rule", [VLLM, SGLANG, TRTLLM])
def test_tokens_found_in_the_cache_are_not_computed(rule: int) -> None:
    prompts, outputs = np.full(3, 100), np.full(3, 11)
    found = np.array([0, 90, 99])
    ttft, tpot = serve(grid_arrays(CONSTANT), rule, NO_LIMITS, prompts, found, outputs, 1)
    assert ttft == pytest.approx([0.11, 0.02, 0.011])
    assert tpot == pytest.approx([0.01] * 3)


def test_prompts_first_delay_decodes_and_mixed_steps_share_them() -> None:
    prompts, outputs = np.full(2, 100), np.full(2, 11)
    limits = (100.0, 1e9, 1e9, 1e9)  # one prompt a step
    arrays, found = grid_arrays(CONSTANT), nothing_found(prompts)
    ttft, tpot = serve(arrays, SGLANG, limits, prompts, found, outputs, 2)
    assert ttft == pytest.approx([0.11, 0.22])
    assert tpot == pytest.approx([(0.11 + 10 * 0.01) / 10, 0.01])
    _, mixed = serve(arrays, TRTLLM, (101.0, 1e9, 1e9, 1e9), prompts, found, outputs, 2)
    assert mixed[0] == pytest.approx((0.11 + 9 * 0.01) / 10)


def test_a_full_cache_makes_requests_wait() -> None:
    prompts, outputs = np.full(4, 100), np.full(4, 10)
    arrays, found = grid_arrays(CONSTANT), nothing_found(prompts)
    free, _ = serve(arrays, TRTLLM, NO_LIMITS, prompts, found, outputs, 4)
    full, _ = serve(arrays, TRTLLM, (1e9, 120.0, 1e9, 1e9), prompts, found, outputs, 4)
    assert free == pytest.approx([0.41] * 4)
    assert full == pytest.approx([0.11, 0.31, 0.51, 0.71])


def test_prompts_of_designs_come_again_and_are_found_while_they_fit(tmp_path: Path) -> None:
    run = one_run(tmp_path, AGGREGATED)
    assert run.sweep is Sweep.DESIGNS
    assert num_requests(run) == 640
    found = found_tokens(run, capacity=10**9)
    assert set(found[:100]) == {0}
    assert set(found[100:]) == {1984}  # all but the last block
    room = 64 * 2100 + 30 * 2000  # for 30 of the 100 prompts beside the requests under way
    assert np.count_nonzero(found_tokens(run, capacity=room)) == 6 * 30


def test_other_sweeps_send_every_prompt_once(tmp_path: Path) -> None:
    run = one_run(tmp_path, AGGREGATED | {"isl": "2048"})
    assert run.sweep is Sweep.GRID
    assert not found_tokens(run, capacity=10**9).any()


def test_instances_share_the_clients_and_batches_stand_in_for_them(tmp_path: Path) -> None:
    assert one_run(tmp_path, AGGREGATED).clients == 64
    shared = AGGREGATED | {"concurrency": "192", "batch_size": "48"}
    assert one_run(tmp_path, shared).clients == 48
    ranks = AGGREGATED | {"concurrency": "192", "batch_size": "48", "attention_dp_size": "4"}
    assert one_run(tmp_path, ranks).clients == 192
    assert one_run(tmp_path, AGGREGATED | {"concurrency": ""}).clients == 64
    pools = one_run(tmp_path, DISAGGREGATED)
    assert (pools.clients, pools.is_concurrency_stated, pools.is_complete) == (24, False, True)
    unknown = one_run(tmp_path, DISAGGREGATED | {"decode_num_workers": "", "concurrency": "9"})
    assert (unknown.clients, unknown.is_complete) == (9, False)


def test_rows_that_cannot_be_judged_are_named_and_the_others_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_csv(
        tmp_path / "rows.csv",
        AGGREGATED,
        DISAGGREGATED | {"id": "pools", "silicon_ttft_ms": ""},
        AGGREGATED | {"id": "nobody", "backend": "tgi"},
        AGGREGATED | {"id": "unmeasured", "silicon_ttft_ms": "", "silicon_tpot_ms": ""},
        AGGREGATED | {"id": "idle", "concurrency": "", "batch_size": ""},
        AGGREGATED | {"id": "strange", "model_path": "acme/unheard-of"},
        AGGREGATED | {"id": "large", "model_path": "meta-llama/Llama-3.1-405B"},
    )
    out, table = tmp_path / "out.json", tmp_path / "out.csv"
    arguments = ["run", "--csv", str(rows), "--json", str(out), "--rows", str(table)]
    monkeypatch.setattr(sys, "argv", arguments)
    fidelity.main()
    printed = capsys.readouterr().out
    assert "judged 2 rows, not judged 5" in printed
    for reason in (
        "line 4 nobody: backend 'tgi' is not one of",
        "line 5 unmeasured: neither silicon_ttft_ms",
        "line 6 idle: neither concurrency nor a batch size",
        "line 7 strange: model 'acme/unheard-of'",
        "large: meta-llama/Llama-3.1-405B with one request of 2100 tokens does not fit 1 x h200",
    ):
        assert reason in printed
    judged = json.loads(out.read_text())
    assert [row["id"] for row in judged["rows"]] == ["a", "pools"]
    assert judged["rows"][1]["ttft_ms"] is None
    assert len(judged["not_judged"]) == 5
    with table.open(newline="") as lines:
        written = list(csv.DictReader(lines))
    assert [row["mode"] for row in written] == ["aggregated", "disaggregated"]
    assert written[1]["ttft_error"] == ""
    assert float(written[1]["predicted_tpot_ms"]) > 0


def test_a_file_without_the_columns_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("system,isl\nh100,3\n")
    with pytest.raises(LocalFault, match="has no column model_path, backend, mode, osl"):
        read_runs(path)


def test_storage_in_a_checkpoints_name_does_not_hide_the_model(tmp_path: Path) -> None:
    run = one_run(tmp_path, AGGREGATED | {"model_path": "Qwen/Qwen3-32B-FP8"})
    assert run.model == "Qwen/Qwen3-32B"


def test_a_sample_of_dense_runs_is_predicted_within_the_promise() -> None:
    runs = [run for run in read_runs()[0] if run.is_dense and not run.is_disaggregated][::5]
    predicted = np.array([predict(run) for run in runs])
    measured = np.array([(run.ttft_s, run.tpot_s) for run in runs])
    ttft_error, tpot_error = np.median(np.abs(predicted / measured - 1), axis=0)
    assert tpot_error < 0.10
    assert ttft_error < 0.25


def test_the_planners_simulator_meets_runs_of_an_engine_that_batches_as_we_do() -> None:
    dense = [run for run in read_runs()[0] if run.is_dense and not run.is_disaggregated]
    runs = [run for run in dense if run.backend == "vllm"][::12]
    predicted = np.array([predict_by_planner(run) for run in runs])
    measured = np.array([(run.ttft_s, run.tpot_s) for run in runs])
    ttft_error, tpot_error = np.median(np.abs(predicted / measured - 1), axis=0)
    assert tpot_error < 0.10
    assert ttft_error < 0.25
