"""Values to protobuf and back, for workers that register and operators who ask."""

import dataclasses
import math

from pdserve.domain import messages as m
from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import LiveSteps, StepCoefficients, StepShape
from pdserve.rpc.layout_codec import layout_from_proto, layout_to_proto
from pdserve.v1 import membership_pb2 as pb

ROLE_TO_PROTO = {m.Role.PREFILL: pb.ROLE_PREFILL, m.Role.DECODE: pb.ROLE_DECODE}
ROLE_FROM_PROTO = {number: role for role, number in ROLE_TO_PROTO.items()}
READS_TO_PROTO = {
    m.Reads.OTHERS: pb.READS_OTHERS,
    m.Reads.OWN: pb.READS_OWN,
    m.Reads.NONE: pb.READS_NONE,
}
READS_FROM_PROTO = {number: reads for reads, number in READS_TO_PROTO.items()}
READS_OF_ROLE = {m.Role.PREFILL: m.Reads.OTHERS, m.Role.DECODE: m.Reads.NONE}
"""What a worker reads that does not say it, since its version is older."""


def _names(kind: type, *but: str) -> tuple[str, ...]:
    """Fields that are called alike, and hold the same, in protobuf."""
    return tuple(field.name for field in dataclasses.fields(kind) if field.name not in but)


_HELLO_FIELDS = _names(m.WorkerHello, "role", "reads", "num_stages", "layout", "coefficients")
_LOAD_FIELDS = _names(m.WorkerLoad, "kv", "prefill_steps", "decode_steps")
_USAGE_FIELDS = _names(KvUsage)
_COEFFICIENT_FIELDS = _names(StepCoefficients)
_SHAPE_FIELDS = _names(StepShape)
_LIVE_FIELDS = _names(LiveSteps, "shape")
_REPLY_FIELDS = _names(m.RegisterReply)
_CLUSTER_FIELDS = _names(m.ClusterState, "workers", "slo")
_SLO_FIELDS = _names(m.SloState)
_WORKER_FIELDS = _names(m.WorkerState, "hello", "load", "coefficients")


def hello_to_proto(hello: m.WorkerHello) -> pb.WorkerHello:
    return pb.WorkerHello(
        role=ROLE_TO_PROTO[hello.role],
        reads=READS_TO_PROTO[hello.reads],
        num_stages=hello.num_stages,
        layout=layout_to_proto(hello.layout),
        coefficients=_coefficients_to_proto(hello.coefficients),
        **{name: getattr(hello, name) for name in _HELLO_FIELDS},
    )


def hello_from_proto(message: pb.WorkerHello) -> m.WorkerHello:
    if message.role not in ROLE_FROM_PROTO:
        raise ValueError(f"unknown role {message.role}")
    role = ROLE_FROM_PROTO[message.role]
    reads = READS_OF_ROLE[role]
    if message.reads != pb.READS_UNSPECIFIED:
        if message.reads not in READS_FROM_PROTO:
            raise ValueError(f"unknown reads {message.reads}")
        reads = READS_FROM_PROTO[message.reads]
    return m.WorkerHello(
        role=role,
        reads=reads,
        num_stages=message.num_stages or 1,
        layout=layout_from_proto(message),
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
    return pb.RegisterReply(**{name: getattr(reply, name) for name in _REPLY_FIELDS})


def reply_from_proto(message: pb.RegisterReply) -> m.RegisterReply:
    return m.RegisterReply(**{name: getattr(message, name) for name in _REPLY_FIELDS})


def cluster_to_proto(state: m.ClusterState) -> pb.ClusterState:
    workers = [
        pb.WorkerState(
            hello=hello_to_proto(worker.hello),
            load=load_to_proto(worker.load),
            **{name: getattr(worker, name) for name in _WORKER_FIELDS},
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
            **{name: getattr(worker, name) for name in _WORKER_FIELDS},
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
