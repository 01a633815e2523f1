"""Everything that crosses a process, as frozen values; `pdserve.rpc` turns them into protobuf.

The field comments of `proto/pdserve/v1` hold here too.
"""

from dataclasses import dataclass
from enum import StrEnum

from pdserve.domain.ids import BlockId, Epoch, HandoffId, RequestId, WorkerId
from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import LiveSteps, StepCoefficients
from pdserve.domain.layout import ShardedLayout
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Completed, Failed, SampledToken


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Reads(StrEnum):
    """Whose prompts a worker reads, as its plan or its cluster file says."""

    OTHERS = "others"  # a prefill worker: those that decode workers hand to it
    OWN = "own"  # a colocated worker: those of the answers that it writes, and no others
    NONE = "none"  # a decode worker beside prefill workers: its own only while there are none


READS_OF_ROLE = {Role.PREFILL: Reads.OTHERS, Role.DECODE: Reads.NONE}
"""What a worker reads that is not told otherwise: it stands beside workers of the other role."""


# Router and decode worker -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHello:
    """First message each way between router and decode worker."""

    peer_id: str
    epoch: Epoch
    protocol_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTarget:
    worker_id: WorkerId
    address: str
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    request_id: RequestId
    attempt: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float
    prefill_targets: tuple[PrefillTarget, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    request_id: RequestId
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    request_id: RequestId
    attempt: int
    first_index: int
    tokens: tuple[SampledToken, ...] = ()
    text: str = ""
    end: Completed | Failed | None = None


@dataclass(frozen=True, slots=True)
class StepOutputs:
    outputs: tuple[RequestOutput, ...]


RouterToDecode = PeerHello | Submit | Cancel
DecodeToRouter = PeerHello | StepOutputs


# Decode worker and prefill worker -----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRegion:
    """How the KV memory of one rank can be read by one transport."""

    transport: str
    address: dict[str, str]
    num_blocks: int
    block_bytes: int
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffHello:
    worker_id: WorkerId
    epoch: Epoch
    protocol_version: int
    model_hash: bytes
    layout: ShardedLayout | None  # None: the peer's version is older
    regions: tuple[RemoteRegion, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StartHandoff:
    handoff: HandoffId
    prompt_token_ids: tuple[int, ...]
    first_block: int
    sampling: SamplingParams
    deadline_s: float
    reads_parts: bool = False  # also `BlocksForming` is of use


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksForming:
    """The prompt's last blocks are being computed; the first parts of each can be read.

    What is read so is checked with the block's digest, once the block is offered.
    """

    handoff: HandoffId
    first_block: int
    block_ids: tuple[BlockId, ...]
    num_ready_parts: int  # of `KvLayout.num_parts`


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksOffered:
    handoff: HandoffId
    first_block: int
    block_ids: tuple[BlockId, ...]
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksPulled:
    handoff: HandoffId
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class RenewLeases:
    handoffs: tuple[HandoffId, ...]


@dataclass(frozen=True, slots=True)
class EndHandoff:
    handoff: HandoffId


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffRefused:
    handoff: HandoffId
    failure: Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillDone:
    handoff: HandoffId
    first_token: SampledToken
    queue_s: float
    prefill_s: float
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffFailed:
    handoff: HandoffId
    failure: Failed


DecodeToPrefill = HandoffHello | StartHandoff | BlocksPulled | RenewLeases | EndHandoff
PrefillToHandoff = HandoffRefused | BlocksForming | BlocksOffered | PrefillDone | HandoffFailed
PrefillToDecode = HandoffHello | PrefillToHandoff


# Worker and router --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHello:
    worker_id: WorkerId
    role: Role
    epoch: Epoch
    protocol_version: int
    address: str
    pid: int
    model_name: str
    model_hash: bytes
    layout: ShardedLayout | None  # None: the worker's version is older
    tokenizer_hash: bytes
    max_context_tokens: int
    vocab_size: int
    block_size: int
    num_blocks: int
    block_bytes: int
    max_num_requests: int
    max_step_tokens: int
    engine: str
    coefficients: StepCoefficients
    reads: Reads
    num_stages: int
    hardware: str = ""  # workers whose texts are equal should be equally fast; empty: not known
    is_measured: bool = False  # the coefficients were measured at start, not given


@dataclass(frozen=True, slots=True, kw_only=True)
class KvMoved:
    """Bytes of KV between two workers; each is counted with the prefill worker's blocks."""

    moved_bytes: int = 0  # read from it, second reads included
    skipped_bytes: int = 0  # not asked for, since the decode worker had them
    retried_bytes: int = 0  # of those moved: read again, since they did not match their digests

    def plus(self, other: "KvMoved") -> "KvMoved":
        return KvMoved(
            moved_bytes=self.moved_bytes + other.moved_bytes,
            skipped_bytes=self.skipped_bytes + other.skipped_bytes,
            retried_bytes=self.retried_bytes + other.retried_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPath:
    """How a decode worker reads a prefill worker's KV, and how much so far."""

    worker_id: WorkerId
    transport: str
    why: str
    num_fallbacks: int  # reads that another transport than this took over from one that failed
    moved: KvMoved = KvMoved()  # since they were linked


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    sequence: int
    num_waiting: int
    num_running: int
    waiting_prompt_tokens: int
    running_context_tokens: int
    kv: KvUsage
    is_draining: bool = False
    num_steps: int = 0
    num_tokens: int = 0
    transferred_bytes: int = 0
    num_corrupt_blocks: int = 0
    prefill_steps: LiveSteps | None = None  # steps with prompt tokens
    decode_steps: LiveSteps | None = None  # steps without
    kv_paths: tuple[KvPath, ...] = ()  # of a decode worker, to those that it has read from


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterReply:
    router_id: str
    epoch: Epoch
    protocol_version: int
    heartbeat_s: float


WorkerReport = WorkerHello | WorkerLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    hello: WorkerHello
    load: WorkerLoad
    health: str
    silence_s: float
    num_assigned: int
    coefficients: StepCoefficients  # what the router takes its steps to cost


@dataclass(frozen=True, slots=True, kw_only=True)
class SloState:
    """One SLO class of a router: what it promises, and how its requests ended."""

    name: str
    ttft_s: float
    tpot_s: float
    target: float  # share that must meet both
    num_met: int = 0
    num_missed_ttft: int = 0
    num_missed_tpot: int = 0
    num_missed_both: int = 0
    num_failed: int = 0
    num_refused: int = 0

    @property
    def num_judged(self) -> int:
        missed = self.num_missed_ttft + self.num_missed_tpot + self.num_missed_both
        return self.num_met + missed + self.num_failed + self.num_refused

    @property
    def attainment(self) -> float | None:
        """The share that met both; None before the first request."""
        return self.num_met / self.num_judged if self.num_judged else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    router_id: str
    model_name: str
    public_address: str
    uptime_s: float
    num_in_flight: int = 0
    num_completed: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_refused: int = 0
    num_waiting: int = 0
    workers: tuple[WorkerState, ...] = ()
    slo: tuple[SloState, ...] = ()

    @property
    def busy_workers(self) -> list[str]:
        """Those that hold KV blocks."""
        return [str(each.hello.worker_id) for each in self.workers if not each.load.kv.is_idle]
