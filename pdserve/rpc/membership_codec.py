"""Values to protobuf and back, for workers that register and operators who ask."""

import math

from pdserve.domain import messages as m
from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import LiveSteps, StepCoefficients, StepShape
from pdserve.rpc.alike import message_of, value_of
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


def hello_to_proto(hello: m.WorkerHello) -> pb.WorkerHello:
    return message_of(
        pb.WorkerHello,
        hello,
        role=ROLE_TO_PROTO[hello.role],
        reads=READS_TO_PROTO[hello.reads],
        layout=layout_to_proto(hello.layout),
        coefficients=message_of(pb.StepCoefficients, hello.coefficients),
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
    return value_of(
        m.WorkerHello,
        message,
        role=role,
        reads=reads,
        num_stages=message.num_stages or 1,
        layout=layout_from_proto(message),
        coefficients=value_of(StepCoefficients, message.coefficients),
    )


def _live_to_proto(steps: LiveSteps | None) -> pb.LiveSteps | None:
    if steps is None:
        return None
    return message_of(
        pb.LiveSteps,
        steps.shape,
        num_steps=steps.num_steps,
        elapsed_s=steps.elapsed_s,
        relative_error=steps.relative_error,
        age_s=steps.age_s,
    )


def _live_from_proto(message: pb.LiveSteps) -> LiveSteps:
    steps = value_of(LiveSteps, message, shape=value_of(StepShape, message))
    times = (steps.elapsed_s, steps.relative_error, steps.age_s)
    if steps.num_steps < 1 or steps.elapsed_s <= 0:
        raise ValueError("live steps must be at least one and take time")
    if not all(math.isfinite(time) and time >= 0 for time in times):
        raise ValueError("times of live steps must be finite and not negative")
    return steps


def load_to_proto(load: m.WorkerLoad) -> pb.WorkerLoad:
    return message_of(
        pb.WorkerLoad,
        load,
        kv=message_of(pb.KvUsage, load.kv),
        prefill_steps=_live_to_proto(load.prefill_steps),
        decode_steps=_live_to_proto(load.decode_steps),
        kv_paths=[
            message_of(pb.KvPath, path, moved=message_of(pb.KvMoved, path.moved))
            for path in load.kv_paths
        ],
    )


def load_from_proto(message: pb.WorkerLoad) -> m.WorkerLoad:
    kv = message.kv
    if kv.free + kv.reserved + kv.held + kv.pinned != kv.total or kv.cached > kv.free:
        raise ValueError("KV blocks do not add up")
    steps = {
        name: _live_from_proto(getattr(message, name)) if message.HasField(name) else None
        for name in ("prefill_steps", "decode_steps")
    }
    paths = tuple(
        value_of(m.KvPath, path, moved=value_of(m.KvMoved, path.moved)) for path in message.kv_paths
    )
    return value_of(m.WorkerLoad, message, kv=value_of(KvUsage, kv), kv_paths=paths, **steps)


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


def cluster_to_proto(state: m.ClusterState) -> pb.ClusterState:
    workers = [
        message_of(
            pb.WorkerState,
            worker,
            hello=hello_to_proto(worker.hello),
            load=load_to_proto(worker.load),
            coefficients=message_of(pb.StepCoefficients, worker.coefficients),
        )
        for worker in state.workers
    ]
    slo = [message_of(pb.SloState, each) for each in state.slo]
    return message_of(pb.ClusterState, state, workers=workers, slo=slo)


def cluster_from_proto(message: pb.ClusterState) -> m.ClusterState:
    workers = tuple(map(_worker_from_proto, message.workers))
    slo = tuple(value_of(m.SloState, each) for each in message.slo)
    return value_of(m.ClusterState, message, workers=workers, slo=slo)


def _worker_from_proto(message: pb.WorkerState) -> m.WorkerState:
    # A router of an older version does not say what it takes steps to cost.
    said = message if message.HasField("coefficients") else message.hello
    return value_of(
        m.WorkerState,
        message,
        hello=hello_from_proto(message.hello),
        load=load_from_proto(message.load),
        coefficients=value_of(StepCoefficients, said.coefficients),
    )
