"""Values to protobuf and back, for workers that register and operators who ask."""

import math

from pdserve.domain import messages as m
from pdserve.domain.ids import Epoch, WorkerId
from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import LiveSteps, StepCoefficients, StepShape
from pdserve.v1 import membership_pb2 as pb

ROLE_TO_PROTO = {m.Role.PREFILL: pb.ROLE_PREFILL, m.Role.DECODE: pb.ROLE_DECODE}
ROLE_FROM_PROTO = {number: role for role, number in ROLE_TO_PROTO.items()}
READS_TO_PROTO = {
    m.Reads.OTHERS: pb.READS_OTHERS,
    m.Reads.OWN: pb.READS_OWN,
    m.Reads.NONE: pb.READS_NONE,
}
READS_FROM_PROTO = {number: reads for reads, number in READS_TO_PROTO.items()}

_HELLO_FIELDS = (
    "protocol_version",
    "address",
    "pid",
    "model_name",
    "model_hash",
    "layout_hash",
    "tokenizer_hash",
    "max_context_tokens",
    "vocab_size",
    "block_size",
    "num_blocks",
    "block_bytes",
    "max_num_requests",
    "max_step_tokens",
    "engine",
    "hardware",
    "is_measured",
)
_LOAD_FIELDS = (
    "sequence",
    "num_waiting",
    "num_running",
    "waiting_prompt_tokens",
    "running_context_tokens",
    "is_draining",
    "num_steps",
    "num_tokens",
    "transferred_bytes",
    "num_corrupt_blocks",
)
_USAGE_FIELDS = ("free", "reserved", "held", "pinned", "total", "cached")
_COEFFICIENT_FIELDS = tuple(StepCoefficients.__dataclass_fields__)
_SHAPE_FIELDS = tuple(StepShape.__dataclass_fields__)
_LIVE_FIELDS = ("num_steps", "elapsed_s", "relative_error", "age_s")
_CLUSTER_FIELDS = (
    "router_id",
    "model_name",
    "public_address",
    "uptime_s",
    "num_in_flight",
    "num_completed",
    "num_failed",
    "num_cancelled",
    "num_refused",
    "num_waiting",
)
_SLO_FIELDS = tuple(m.SloState.__dataclass_fields__)


def hello_to_proto(hello: m.WorkerHello) -> pb.WorkerHello:
    return pb.WorkerHello(
        worker_id=hello.worker_id,
        role=ROLE_TO_PROTO[hello.role],
        epoch=hello.epoch,
        reads=READS_TO_PROTO[hello.reads],
        num_stages=hello.num_stages,
        coefficients=_coefficients_to_proto(hello.coefficients),
        **{name: getattr(hello, name) for name in _HELLO_FIELDS},
    )


def hello_from_proto(message: pb.WorkerHello) -> m.WorkerHello:
    if message.role not in ROLE_FROM_PROTO:
        raise ValueError(f"unknown role {message.role}")
    role = ROLE_FROM_PROTO[message.role]
    reads = m.READS_OF_ROLE[role]
    if message.reads != pb.READS_UNSPECIFIED:
        if message.reads not in READS_FROM_PROTO:
            raise ValueError(f"unknown reads {message.reads}")
        reads = READS_FROM_PROTO[message.reads]
    return m.WorkerHello(
        worker_id=WorkerId(message.worker_id),
        role=role,
        epoch=Epoch(message.epoch),
        reads=reads,
        num_stages=message.num_stages or 1,
        coefficients=_coefficients_from_proto(message.coefficients),
        **{name: getattr(message, name) for name in _HELLO_FIELDS},
    )


def _coefficients_to_proto(coefficients: StepCoefficients) -> pb.StepCoefficients:
    return pb.StepCoefficients(
        **{name: getattr(coefficients, name) for name in _COEFFICIENT_FIELDS}
    )


def _coefficients_from_proto(message: pb.StepCoefficients) -> StepCoefficients:
    return StepCoefficients(**{name: getattr(message, name) for name in _COEFFICIENT_FIELDS})


def _live_to_proto(steps: LiveSteps | None) -> pb.LiveSteps | None:
    if steps is None:
        return None
    return pb.LiveSteps(
        **{name: getattr(steps, name) for name in _LIVE_FIELDS},
        **{name: getattr(steps.shape, name) for name in _SHAPE_FIELDS},
    )


def _live_from_proto(message: pb.LiveSteps) -> LiveSteps:
    steps = LiveSteps(
        shape=StepShape(**{name: getattr(message, name) for name in _SHAPE_FIELDS}),
        **{name: getattr(message, name) for name in _LIVE_FIELDS},
    )
    times = (steps.elapsed_s, steps.relative_error, steps.age_s)
    if steps.num_steps < 1 or steps.elapsed_s <= 0:
        raise ValueError("live steps must be at least one and take time")
    if not all(math.isfinite(time) and time >= 0 for time in times):
        raise ValueError("times of live steps must be finite and not negative")
    return steps


def load_to_proto(load: m.WorkerLoad) -> pb.WorkerLoad:
    return pb.WorkerLoad(
        kv=pb.KvUsage(**{name: getattr(load.kv, name) for name in _USAGE_FIELDS}),
        prefill_steps=_live_to_proto(load.prefill_steps),
        decode_steps=_live_to_proto(load.decode_steps),
        **{name: getattr(load, name) for name in _LOAD_FIELDS},
    )


def load_from_proto(message: pb.WorkerLoad) -> m.WorkerLoad:
    kv = message.kv
    if kv.free + kv.reserved + kv.held + kv.pinned != kv.total or kv.cached > kv.free:
        raise ValueError("KV blocks do not add up")
    return m.WorkerLoad(
        kv=KvUsage(**{name: getattr(kv, name) for name in _USAGE_FIELDS}),
        prefill_steps=(
            _live_from_proto(message.prefill_steps) if message.HasField("prefill_steps") else None
        ),
        decode_steps=(
            _live_from_proto(message.decode_steps) if message.HasField("decode_steps") else None
        ),
        **{name: getattr(message, name) for name in _LOAD_FIELDS},
    )


def report_to_proto(report: m.WorkerReport) -> pb.WorkerReport:
    if isinstance(report, m.WorkerHello):
        return pb.WorkerReport(hello=hello_to_proto(report))
    return pb.WorkerReport(load=load_to_proto(report))


def report_from_proto(message: pb.WorkerReport) -> m.WorkerReport:
    match message.WhichOneof("report"):
        case "hello":
            return hello_from_proto(message.hello)
        case "load":
            return load_from_proto(message.load)
        case other:
            raise ValueError(f"unknown report {other}")


def reply_to_proto(reply: m.RegisterReply) -> pb.RegisterReply:
    return pb.RegisterReply(
        router_id=reply.router_id,
        epoch=reply.epoch,
        protocol_version=reply.protocol_version,
        heartbeat_s=reply.heartbeat_s,
    )


def reply_from_proto(message: pb.RegisterReply) -> m.RegisterReply:
    return m.RegisterReply(
        router_id=message.router_id,
        epoch=Epoch(message.epoch),
        protocol_version=message.protocol_version,
        heartbeat_s=message.heartbeat_s,
    )


def cluster_to_proto(state: m.ClusterState) -> pb.ClusterState:
    workers = [
        pb.WorkerState(
            hello=hello_to_proto(worker.hello),
            load=load_to_proto(worker.load),
            health=worker.health,
            silence_s=worker.silence_s,
            num_assigned=worker.num_assigned,
            coefficients=_coefficients_to_proto(worker.coefficients),
        )
        for worker in state.workers
    ]
    slo = [pb.SloState(**{name: getattr(each, name) for name in _SLO_FIELDS}) for each in state.slo]
    return pb.ClusterState(
        workers=workers, slo=slo, **{name: getattr(state, name) for name in _CLUSTER_FIELDS}
    )


def cluster_from_proto(message: pb.ClusterState) -> m.ClusterState:
    workers = tuple(
        m.WorkerState(
            hello=hello_from_proto(worker.hello),
            load=load_from_proto(worker.load),
            health=worker.health,
            silence_s=worker.silence_s,
            num_assigned=worker.num_assigned,
            coefficients=_coefficients_from_proto(
                worker.coefficients
                if worker.HasField("coefficients")
                else worker.hello.coefficients  # a router of an older version
            ),
        )
        for worker in message.workers
    )
    slo = tuple(
        m.SloState(**{name: getattr(each, name) for name in _SLO_FIELDS}) for each in message.slo
    )
    return m.ClusterState(
        workers=workers, slo=slo, **{name: getattr(message, name) for name in _CLUSTER_FIELDS}
    )
