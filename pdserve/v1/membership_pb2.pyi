from pdserve.v1 import layout_pb2 as _layout_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]

class Reads(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    READS_UNSPECIFIED: _ClassVar[Reads]
    READS_OTHERS: _ClassVar[Reads]
    READS_OWN: _ClassVar[Reads]
    READS_NONE: _ClassVar[Reads]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
READS_UNSPECIFIED: Reads
READS_OTHERS: Reads
READS_OWN: Reads
READS_NONE: Reads

class WorkerReport(_message.Message):
    __slots__ = ("hello", "load")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    load: WorkerLoad
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker_id", "role", "epoch", "protocol_version", "address", "pid", "model_name", "model_hash", "max_context_tokens", "vocab_size", "block_size", "num_blocks", "block_bytes", "max_num_requests", "coefficients", "engine", "tokenizer_hash", "max_step_tokens", "reads", "num_stages", "hardware", "is_measured", "layout")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    IS_MEASURED_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: Role
    epoch: int
    protocol_version: int
    address: str
    pid: int
    model_name: str
    model_hash: bytes
    max_context_tokens: int
    vocab_size: int
    block_size: int
    num_blocks: int
    block_bytes: int
    max_num_requests: int
    coefficients: StepCoefficients
    engine: str
    tokenizer_hash: bytes
    max_step_tokens: int
    reads: Reads
    num_stages: int
    hardware: str
    is_measured: bool
    layout: _layout_pb2.ShardedLayout
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., epoch: _Optional[int] = ..., protocol_version: _Optional[int] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., model_name: _Optional[str] = ..., model_hash: _Optional[bytes] = ..., max_context_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., max_num_requests: _Optional[int] = ..., coefficients: _Optional[_Union[StepCoefficients, _Mapping]] = ..., engine: _Optional[str] = ..., tokenizer_hash: _Optional[bytes] = ..., max_step_tokens: _Optional[int] = ..., reads: _Optional[_Union[Reads, str]] = ..., num_stages: _Optional[int] = ..., hardware: _Optional[str] = ..., is_measured: _Optional[bool] = ..., layout: _Optional[_Union[_layout_pb2.ShardedLayout, _Mapping]] = ...) -> None: ...

class StepCoefficients(_message.Message):
    __slots__ = ("fixed_s", "prefill_token_s", "prefill_attention_s", "decode_token_s", "decode_context_token_s", "relative_error")
    FIXED_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ATTENTION_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    fixed_s: float
    prefill_token_s: float
    prefill_attention_s: float
    decode_token_s: float
    decode_context_token_s: float
    relative_error: float
    def __init__(self, fixed_s: _Optional[float] = ..., prefill_token_s: _Optional[float] = ..., prefill_attention_s: _Optional[float] = ..., decode_token_s: _Optional[float] = ..., decode_context_token_s: _Optional[float] = ..., relative_error: _Optional[float] = ...) -> None: ...

class LiveSteps(_message.Message):
    __slots__ = ("num_steps", "num_prefill_tokens", "num_prefill_pairs", "num_decodes", "num_decode_context_tokens", "elapsed_s", "relative_error", "age_s")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_PAIRS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODES_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    num_prefill_tokens: int
    num_prefill_pairs: int
    num_decodes: int
    num_decode_context_tokens: int
    elapsed_s: float
    relative_error: float
    age_s: float
    def __init__(self, num_steps: _Optional[int] = ..., num_prefill_tokens: _Optional[int] = ..., num_prefill_pairs: _Optional[int] = ..., num_decodes: _Optional[int] = ..., num_decode_context_tokens: _Optional[int] = ..., elapsed_s: _Optional[float] = ..., relative_error: _Optional[float] = ..., age_s: _Optional[float] = ...) -> None: ...

class KvUsage(_message.Message):
    __slots__ = ("free", "reserved", "held", "pinned", "total", "cached")
    FREE_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    free: int
    reserved: int
    held: int
    pinned: int
    total: int
    cached: int
    def __init__(self, free: _Optional[int] = ..., reserved: _Optional[int] = ..., held: _Optional[int] = ..., pinned: _Optional[int] = ..., total: _Optional[int] = ..., cached: _Optional[int] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("sequence", "num_waiting", "num_running", "waiting_prompt_tokens", "running_context_tokens", "kv", "is_draining", "num_steps", "num_tokens", "transferred_bytes", "num_corrupt_blocks", "prefill_steps", "decode_steps", "kv_paths")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_CORRUPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_STEPS_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEPS_FIELD_NUMBER: _ClassVar[int]
    KV_PATHS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    num_waiting: int
    num_running: int
    waiting_prompt_tokens: int
    running_context_tokens: int
    kv: KvUsage
    is_draining: bool
    num_steps: int
    num_tokens: int
    transferred_bytes: int
    num_corrupt_blocks: int
    prefill_steps: LiveSteps
    decode_steps: LiveSteps
    kv_paths: _containers.RepeatedCompositeFieldContainer[KvPath]
    def __init__(self, sequence: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., waiting_prompt_tokens: _Optional[int] = ..., running_context_tokens: _Optional[int] = ..., kv: _Optional[_Union[KvUsage, _Mapping]] = ..., is_draining: _Optional[bool] = ..., num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., transferred_bytes: _Optional[int] = ..., num_corrupt_blocks: _Optional[int] = ..., prefill_steps: _Optional[_Union[LiveSteps, _Mapping]] = ..., decode_steps: _Optional[_Union[LiveSteps, _Mapping]] = ..., kv_paths: _Optional[_Iterable[_Union[KvPath, _Mapping]]] = ...) -> None: ...

class KvPath(_message.Message):
    __slots__ = ("worker_id", "transport", "why", "num_fallbacks", "moved")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    NUM_FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    transport: str
    why: str
    num_fallbacks: int
    moved: KvMoved
    def __init__(self, worker_id: _Optional[str] = ..., transport: _Optional[str] = ..., why: _Optional[str] = ..., num_fallbacks: _Optional[int] = ..., moved: _Optional[_Union[KvMoved, _Mapping]] = ...) -> None: ...

class KvMoved(_message.Message):
    __slots__ = ("moved_bytes", "skipped_bytes", "retried_bytes")
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RETRIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    moved_bytes: int
    skipped_bytes: int
    retried_bytes: int
    def __init__(self, moved_bytes: _Optional[int] = ..., skipped_bytes: _Optional[int] = ..., retried_bytes: _Optional[int] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("router_id", "epoch", "protocol_version", "heartbeat_s")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    epoch: int
    protocol_version: int
    heartbeat_s: float
    def __init__(self, router_id: _Optional[str] = ..., epoch: _Optional[int] = ..., protocol_version: _Optional[int] = ..., heartbeat_s: _Optional[float] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClusterState(_message.Message):
    __slots__ = ("router_id", "model_name", "workers", "num_in_flight", "num_completed", "num_failed", "num_cancelled", "num_refused", "public_address", "uptime_s", "slo", "num_waiting")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    NUM_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPLETED_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    NUM_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    model_name: str
    workers: _containers.RepeatedCompositeFieldContainer[WorkerState]
    num_in_flight: int
    num_completed: int
    num_failed: int
    num_cancelled: int
    num_refused: int
    public_address: str
    uptime_s: float
    slo: _containers.RepeatedCompositeFieldContainer[SloState]
    num_waiting: int
    def __init__(self, router_id: _Optional[str] = ..., model_name: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[WorkerState, _Mapping]]] = ..., num_in_flight: _Optional[int] = ..., num_completed: _Optional[int] = ..., num_failed: _Optional[int] = ..., num_cancelled: _Optional[int] = ..., num_refused: _Optional[int] = ..., public_address: _Optional[str] = ..., uptime_s: _Optional[float] = ..., slo: _Optional[_Iterable[_Union[SloState, _Mapping]]] = ..., num_waiting: _Optional[int] = ...) -> None: ...

class SloState(_message.Message):
    __slots__ = ("name", "ttft_s", "tpot_s", "target", "num_met", "num_missed_ttft", "num_missed_tpot", "num_missed_both", "num_failed", "num_refused")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    NUM_MET_FIELD_NUMBER: _ClassVar[int]
    NUM_MISSED_TTFT_FIELD_NUMBER: _ClassVar[int]
    NUM_MISSED_TPOT_FIELD_NUMBER: _ClassVar[int]
    NUM_MISSED_BOTH_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    name: str
    ttft_s: float
    tpot_s: float
    target: float
    num_met: int
    num_missed_ttft: int
    num_missed_tpot: int
    num_missed_both: int
    num_failed: int
    num_refused: int
    def __init__(self, name: _Optional[str] = ..., ttft_s: _Optional[float] = ..., tpot_s: _Optional[float] = ..., target: _Optional[float] = ..., num_met: _Optional[int] = ..., num_missed_ttft: _Optional[int] = ..., num_missed_tpot: _Optional[int] = ..., num_missed_both: _Optional[int] = ..., num_failed: _Optional[int] = ..., num_refused: _Optional[int] = ...) -> None: ...

class WorkerState(_message.Message):
    __slots__ = ("hello", "load", "health", "silence_s", "num_assigned", "coefficients")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    SILENCE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    load: WorkerLoad
    health: str
    silence_s: float
    num_assigned: int
    coefficients: StepCoefficients
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., health: _Optional[str] = ..., silence_s: _Optional[float] = ..., num_assigned: _Optional[int] = ..., coefficients: _Optional[_Union[StepCoefficients, _Mapping]] = ...) -> None: ...
