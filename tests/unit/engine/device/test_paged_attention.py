"""Paged attention on devices, by Triton's kernels and in plain torch, against `attend_dense`."""

import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pdserve.domain.errors import LocalFault
from pdserve.engine.device.op import paged_attention, triton_obstacle
from pdserve.engine.device.plan import PADDING, AttentionPlan, PlanShape
from pdserve.engine.device.request import AttentionRequest
from pdserve.engine.device.torch_attention import attend_in_torch
from pdserve.engine.device.variants import (
    AttentionKind,
    check_tile,
    choose_splits,
    chunk_rows_per_tile,
)
from tests.support.attention_cases import CASES, Case, verdict
from tests.support.attention_kinds import REALISTIC

torch.set_num_threads(1)

NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[str]]:
    """What is wrong with each case when Triton's interpreter runs the kernels.

    In a process of its own: kernels are interpreted or compiled by what the environment says when
    they are imported, for good.
    """
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.attention_cases"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return dict(json.loads(line) for line in ended.stdout.splitlines())


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_kernels_agree_with_dense_attention(case: Case, interpreted: dict[str, list[str]]) -> None:
    assert interpreted[case.name] == [], case


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_plain_torch_agrees_with_dense_attention(case: Case) -> None:
    assert verdict(case, partial(paged_attention, kernels="torch")) == [], case


def test_there_are_many_cases_and_each_has_its_name() -> None:
    assert len(set(NAMES)) == len(CASES) >= 40


def _padding_alone(num_rows: int) -> tuple[AttentionPlan, list[torch.Tensor]]:
    """A plan of nobody, and query, key, value, K and V of two heads of 4 values."""
    shape = PlanShape.decode(num_rows, width=2)
    plan = AttentionPlan.over(torch.zeros(shape.num_values, dtype=torch.int32), shape)
    plan.row_blocks.fill_(PADDING)
    parts = [torch.randn(num_rows, 2, 4) for _ in range(3)]
    return plan, parts + [torch.randn(3, 4, 2, 4) for _ in range(2)]


def test_a_batch_of_padding_alone_leaves_memory_as_it_is() -> None:
    plan, (query, key, value, k_cache, v_cache) = _padding_alone(3)
    before = k_cache.clone(), v_cache.clone()
    out = paged_attention(query, key, value, k_cache, v_cache, plan, scaling=1.0)
    assert torch.equal(out, torch.zeros(3, 2, 4))
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


def test_the_operator_has_a_fake_kernel_and_says_what_it_changes() -> None:
    plan, (query, key, value, k_cache, v_cache) = _padding_alone(3)
    tensors = (
        plan.row_blocks,
        plan.row_offsets,
        plan.tables,
        plan.firsts,
        plan.starts,
        plan.tile_sequence,
        plan.tile_row,
        plan.tile_rows,
    )
    with torch.inference_mode():
        results = torch.library.opcheck(
            torch.ops.pdserve.paged_attention.default,
            (query, key, value, k_cache, v_cache, *tensors, None, 1.0, 0, 0, 0.0, 1, 1, "auto"),
            test_utils=("test_schema", "test_faketensor"),
        )
    assert set(results.values()) == {"SUCCESS"}


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what reads a tensor's values, as a graph does that is being captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for reading in ("item", "_local_scalar_dense", "nonzero", "masked_select", "unique"):
            assert not str(func).startswith(f"aten.{reading}."), func
        return func(*args, **(kwargs or {}))


def _recording() -> Any:
    return _Recording()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", ["mixed and split", "decode, padded", "decode, sinks whole"])
def test_plain_torch_reads_no_values_on_the_host(name: str) -> None:
    def attend(*parts: Any, splits: int, **options: Any) -> torch.Tensor:
        *tensors, plan = parts
        names = ("query", "key", "value", "k_cache", "v_cache")
        call = AttentionRequest(**dict(zip(names, tensors, strict=True)), **options)
        with _recording():  # in here, because a mode sees the operator as one
            return attend_in_torch(call, plan)

    assert verdict(next(case for case in CASES if case.name == name), attend) == []


def test_what_reads_values_is_seen_by_that_test() -> None:
    with _recording(), pytest.raises(AssertionError, match="aten"):
        torch.ones(1).item()


def test_a_cpu_takes_plain_torch() -> None:
    assert "cpu" in str(triton_obstacle("cpu"))


def test_a_machine_without_triton_takes_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed" in str(triton_obstacle.__wrapped__("cuda"))


@pytest.mark.parametrize("kind", REALISTIC[::3], ids=lambda kind: f"{kind.heads}-{kind.kv_heads}")
def test_tiles_for_chunks_are_ones_that_kernels_take(kind: AttentionKind) -> None:
    check_tile(kind, chunk_rows_per_tile([kind]))


@pytest.mark.parametrize(
    ("rows", "reason"), [(3, "power of two"), (0, "power of two"), (64, "256")]
)
def test_other_tiles_are_refused_with_the_reason(rows: int, reason: str) -> None:
    kind = next(kind for kind in REALISTIC if kind.group == 4)
    with pytest.raises(LocalFault, match=reason):
        check_tile(kind, rows)


def test_splits_fill_the_processors_and_no_more() -> None:
    assert choose_splits(1, 8, 132, 100_000) == 33  # two programs to a processor
    assert choose_splits(64, 8, 132, 100_000) == 1
    assert choose_splits(1, 1, 132, 512) == 2  # a part has 256 keys
    assert choose_splits(1, 1, 132, 1 << 20) == 64
