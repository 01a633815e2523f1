from pdserve.v1 import layout_pb2 as _layout_pb2
from pdserve.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HandoffId(_message.Message):
    __slots__ = ("request_id", "attempt", "retry")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    retry: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., retry: _Optional[int] = ...) -> None: ...

class DecodeToPrefill(_message.Message):
    __slots__ = ("hello", "start", "pulled", "renew", "end")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    PULLED_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    hello: HandoffHello
    start: StartHandoff
    pulled: BlocksPulled
    renew: RenewLeases
    end: EndHandoff
    def __init__(self, hello: _Optional[_Union[HandoffHello, _Mapping]] = ..., start: _Optional[_Union[StartHandoff, _Mapping]] = ..., pulled: _Optional[_Union[BlocksPulled, _Mapping]] = ..., renew: _Optional[_Union[RenewLeases, _Mapping]] = ..., end: _Optional[_Union[EndHandoff, _Mapping]] = ...) -> None: ...

class PrefillToDecode(_message.Message):
    __slots__ = ("hello", "refused", "offered", "done", "failed", "forming")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    OFFERED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    FORMING_FIELD_NUMBER: _ClassVar[int]
    hello: HandoffHello
    refused: HandoffRefused
    offered: BlocksOffered
    done: PrefillDone
    failed: HandoffFailed
    forming: BlocksForming
    def __init__(self, hello: _Optional[_Union[HandoffHello, _Mapping]] = ..., refused: _Optional[_Union[HandoffRefused, _Mapping]] = ..., offered: _Optional[_Union[BlocksOffered, _Mapping]] = ..., done: _Optional[_Union[PrefillDone, _Mapping]] = ..., failed: _Optional[_Union[HandoffFailed, _Mapping]] = ..., forming: _Optional[_Union[BlocksForming, _Mapping]] = ...) -> None: ...

class HandoffHello(_message.Message):
    __slots__ = ("worker_id", "epoch", "protocol_version", "model_hash", "layout", "regions")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    protocol_version: int
    model_hash: bytes
    layout: _layout_pb2.ShardedLayout
    regions: _containers.RepeatedCompositeFieldContainer[RemoteRegion]
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., protocol_version: _Optional[int] = ..., model_hash: _Optional[bytes] = ..., layout: _Optional[_Union[_layout_pb2.ShardedLayout, _Mapping]] = ..., regions: _Optional[_Iterable[_Union[RemoteRegion, _Mapping]]] = ...) -> None: ...

class RemoteRegion(_message.Message):
    __slots__ = ("transport", "address", "num_blocks", "block_bytes", "rank")
    class AddressEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    transport: str
    address: _containers.ScalarMap[str, str]
    num_blocks: int
    block_bytes: int
    rank: int
    def __init__(self, transport: _Optional[str] = ..., address: _Optional[_Mapping[str, str]] = ..., num_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class StartHandoff(_message.Message):
    __slots__ = ("handoff", "prompt_token_ids", "first_block", "sampling", "deadline_s", "reads_parts")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    READS_PARTS_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    first_block: int
    sampling: _types_pb2.SamplingParams
    deadline_s: float
    reads_parts: bool
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., first_block: _Optional[int] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., deadline_s: _Optional[float] = ..., reads_parts: _Optional[bool] = ...) -> None: ...

class BlocksForming(_message.Message):
    __slots__ = ("handoff", "first_block", "block_ids", "num_ready_parts")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_READY_PARTS_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    first_block: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    num_ready_parts: int
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., first_block: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., num_ready_parts: _Optional[int] = ...) -> None: ...

class BlocksOffered(_message.Message):
    __slots__ = ("handoff", "first_block", "block_ids", "digests")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    first_block: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., first_block: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class BlocksPulled(_message.Message):
    __slots__ = ("handoff", "first_block", "num_blocks")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    first_block: int
    num_blocks: int
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class RenewLeases(_message.Message):
    __slots__ = ("handoffs",)
    HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    handoffs: _containers.RepeatedCompositeFieldContainer[HandoffId]
    def __init__(self, handoffs: _Optional[_Iterable[_Union[HandoffId, _Mapping]]] = ...) -> None: ...

class EndHandoff(_message.Message):
    __slots__ = ("handoff",)
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ...) -> None: ...

class HandoffRefused(_message.Message):
    __slots__ = ("handoff", "failure")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    failure: _types_pb2.Failure
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., failure: _Optional[_Union[_types_pb2.Failure, _Mapping]] = ...) -> None: ...

class PrefillDone(_message.Message):
    __slots__ = ("handoff", "first_token", "queue_s", "prefill_s", "cached_tokens")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    first_token: _types_pb2.Token
    queue_s: float
    prefill_s: float
    cached_tokens: int
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., first_token: _Optional[_Union[_types_pb2.Token, _Mapping]] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class HandoffFailed(_message.Message):
    __slots__ = ("handoff", "failure")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffId
    failure: _types_pb2.Failure
    def __init__(self, handoff: _Optional[_Union[HandoffId, _Mapping]] = ..., failure: _Optional[_Union[_types_pb2.Failure, _Mapping]] = ...) -> None: ...
