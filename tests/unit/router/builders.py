"""Values that the router's tests start from; each test says only what it is about."""

from dataclasses import replace
from typing import Any

from pdserve.domain.ids import PROTOCOL_VERSION, Epoch, WorkerId
from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.layout import KvLayout, LayerKv, ShardedLayout
from pdserve.domain.messages import Reads, Role, WorkerHello, WorkerLoad
from router.cluster_view import (
    NOTHING,
    Assigned,
    ClusterView,
    Health,
    WorkerView,
    work_of_others,
)

COEFFICIENTS = StepCoefficients(
    fixed_s=0.010,
    prefill_token_s=0.001,
    prefill_attention_s=0.0,
    decode_token_s=0.002,
    decode_context_token_s=0.00001,
)
LAYOUT = ShardedLayout(
    whole=KvLayout(layers=(LayerKv(2, 4, 4),) * 2, block_size=16, dtype="float32", item_bytes=4)
)
OTHER_LAYOUT = replace(LAYOUT, whole=replace(LAYOUT.whole, dtype="bfloat16", item_bytes=2))


def make_hello(name: str = "d0", role: Role = Role.DECODE, /, **changes: Any) -> WorkerHello:
    hello = WorkerHello(
        worker_id=WorkerId(name),
        role=role,
        epoch=Epoch(1),
        protocol_version=PROTOCOL_VERSION,
        address="127.0.0.1:1",
        pid=1,
        model_name="demo",
        model_hash=b"model",
        layout=LAYOUT,
        tokenizer_hash=b"",
        max_context_tokens=1024,
        vocab_size=2048,
        block_size=16,
        num_blocks=100,
        block_bytes=1,
        max_num_requests=8,
        max_step_tokens=512,
        engine="timed",
        coefficients=COEFFICIENTS,
        reads=Reads.OTHERS if role is Role.PREFILL else Reads.NONE,
        num_stages=1,
    )
    return replace(hello, **changes)


def make_load(num_blocks: int = 100, num_in_use: int = 0, **changes: Any) -> WorkerLoad:
    kv = KvUsage(
        free=num_blocks - num_in_use, reserved=0, held=num_in_use, pinned=0, total=num_blocks
    )
    load = WorkerLoad(
        sequence=0,
        num_waiting=0,
        num_running=0,
        waiting_prompt_tokens=0,
        running_context_tokens=0,
        kv=kv,
    )
    return replace(load, **changes)


def make_worker(
    name: str,
    role: Role = Role.DECODE,
    /,
    *,
    load: WorkerLoad | None = None,
    assigned: Assigned = NOTHING,
    assigned_at_report: Assigned = NOTHING,
    health: Health = Health.ALIVE,
    **changes: Any,
) -> WorkerView:
    hello = make_hello(name, role, **changes)
    load = load or make_load(hello.num_blocks)
    return WorkerView(
        hello=hello,
        load=load,
        health=health,
        coefficients=hello.coefficients,
        assigned=assigned,
        others=work_of_others(load, assigned_at_report),
    )


def make_view(*workers: WorkerView) -> ClusterView:
    by_id = sorted(workers, key=lambda worker: worker.life)
    return ClusterView(
        prefill=tuple(worker for worker in by_id if worker.hello.role is Role.PREFILL),
        decode=tuple(worker for worker in by_id if worker.hello.role is Role.DECODE),
    )
