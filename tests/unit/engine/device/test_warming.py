"""No step compiles a kernel: all that steps launch was compiled when the model was loaded."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pdserve.engine.device.plan import AttentionPlan, PlanShape
from pdserve.engine.device.request import AttentionRequest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from pdserve.engine.device import kernels, triton_attention

ROWS_PER_TILE = 16
HEADS, KV_HEADS, DIM, BLOCK_SIZE = 8, 2, 24, 7


class Launches:
    """In the place of the kernels: keeps what Triton compiles each launch for, on an H100."""

    IS_INTERPRETED = False

    def __init__(self) -> None:
        self.compiled: set[tuple[str, str]] = set()
        self._backend = make_backend(GPUTarget("cuda", 90, 32))

    def __getattr__(self, name: str) -> "Launches._Kernel":
        return Launches._Kernel(self, name)

    class _Kernel:
        def __init__(self, launches: "Launches", name: str) -> None:
            self._launches, self._name = launches, name
            self._function: Any = getattr(kernels, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            function = self._function
            bind: Any = create_function_from_signature(
                function.signature, function.params, self._launches._backend
            )

            def launch(*arguments: Any, **constants: Any) -> None:
                _, specialization, options = bind(*arguments, **constants)
                self._launches.compiled.add((self._name, f"{specialization} {options}"))

            return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    kept = Launches()
    monkeypatch.setattr(triton_attention, "_kernels", lambda: kept)
    triton_attention._launch.cache_clear()
    return kept


def layers() -> list[AttentionRequest]:
    """Of a model in whose blocks layers lie at places that are and are not aligned."""
    size = 2 * BLOCK_SIZE * KV_HEADS * DIM
    flat = torch.zeros(9, 3 * size + 1, dtype=torch.bfloat16)
    features: list[dict[str, Any]] = [
        {},
        {"window": 12, "sinks": torch.zeros(HEADS, dtype=torch.bfloat16)},
        {"softcap": 5.0},
    ]
    requests = []
    for layer, own in enumerate(features):
        shape = (9, BLOCK_SIZE, KV_HEADS, DIM)
        start = layer * size + (layer == 2)
        key, value = (flat[:, at : at + size // 2].view(shape) for at in (start, start + size // 2))
        query, new = (torch.zeros(1, heads, DIM, dtype=torch.bfloat16) for heads in (8, 2))
        requests.append(
            AttentionRequest(
                query=query, key=new, value=new, k_cache=key, v_cache=value, scaling=1.0, **own
            )
        )
    return requests


def plan_of(num_rows: int, rows_per_tile: int) -> AttentionPlan:
    """At a place in memory that is not aligned, as a part of what is staged for a step."""
    shape = PlanShape(
        rows=num_rows,
        sequences=num_rows,
        width=num_rows,
        tiles=-(-num_rows // rows_per_tile),
        rows_per_tile=rows_per_tile,
    )
    return AttentionPlan.over(torch.zeros(shape.num_values + 1, dtype=torch.int32)[1:], shape)


def rows_of(num_rows: int, form: str) -> list[torch.Tensor]:
    """Query, key and value as models make them: apart, or views of one projection."""
    if form == "packed":
        width = (HEADS + 2 * KV_HEADS) * DIM
        packed = torch.zeros(num_rows, width, dtype=torch.bfloat16).view(num_rows, -1, DIM)
        ends = (0, HEADS, HEADS + KV_HEADS, HEADS + 2 * KV_HEADS)
        return [packed[:, first:end] for first, end in itertools.pairwise(ends)]
    heads = (HEADS, KV_HEADS, KV_HEADS)
    if form == "heads first":
        return [torch.zeros(each, num_rows, DIM).bfloat16().transpose(0, 1) for each in heads]
    return [torch.zeros(num_rows, each, DIM, dtype=torch.bfloat16) for each in heads]


@pytest.mark.parametrize("form", ["apart", "packed", "heads first"])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 16, 17])
def test_no_step_compiles_anything(launches: Launches, num_rows: int, form: str) -> None:
    requests = layers()
    triton_attention.warm(requests, rows_per_tile=(1, ROWS_PER_TILE))
    warmed = set(launches.compiled)
    assert warmed
    for request in requests:
        for rows_per_tile in (1, ROWS_PER_TILE):
            for splits in (1, 2, 16, 33):
                query, key, value = rows_of(num_rows, form)
                call = AttentionRequest(
                    query=query,
                    key=key,
                    value=value,
                    k_cache=request.k_cache,
                    v_cache=request.v_cache,
                    scaling=1.0,
                    window=request.window,
                    softcap=request.softcap,
                    sinks=request.sinks,
                    splits=splits,
                    rows_per_tile=rows_per_tile,
                )
                triton_attention.attend_in_triton(call, plan_of(num_rows, rows_per_tile))
    assert launches.compiled == warmed


def test_layers_that_are_alike_are_warmed_once(launches: Launches) -> None:
    requests = layers()
    once = triton_attention.warm(requests, rows_per_tile=(1, ROWS_PER_TILE))
    assert triton_attention.warm(requests * 5, rows_per_tile=(1, ROWS_PER_TILE)) == once


def test_triton_is_one_that_the_kernels_were_tried_with() -> None:
    assert tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
