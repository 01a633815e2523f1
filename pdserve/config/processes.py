"""What one process is told at its start: a JSON or YAML object, checked before any work."""

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from pdserve.config.base import Settings
from pdserve.config.binding import Address, Host, check_advertised, check_binding
from pdserve.config.override import OverrideConfig
from pdserve.config.ranks import RankSettings, check_ranks
from pdserve.config.timers import Timers
from pdserve.domain.addresses import MAX_PORT
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.layout import MAX_BLOCK_SIZE
from pdserve.domain.messages import READS_OF_ROLE, Reads, Role
from pdserve.domain.overlap import Overlap
from pdserve.domain.pair_cost import PolicyName
from pdserve.domain.waiting import QueueOrder

LogLevel = Literal["debug", "info", "warning", "error"]
LOG_FILE = "where the process keeps its log, within the two limits below; empty: standard error"
INSECURE = "listen on addresses that others can reach, without TLS and login"
TransportName = Literal["shm", "tcp", "collective", "nixl"]
DEFAULT_BLOCK_SIZE = 16
DEFAULT_NUM_BLOCKS = 1024
MAX_PARALLEL = 1024
DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
BlockSize = Annotated[int, Field(ge=1, le=MAX_BLOCK_SIZE, description="tokens in a KV block")]


class ProcessSettings(Settings):
    """What every process is told: how long it waits, and what it logs."""

    timers: Timers = Field(Timers(), description="seconds")
    log_level: LogLevel = Field("info", description="debug, info, warning or error")
    max_log_bytes: int = Field(
        16 << 20,
        ge=64 << 10,
        le=1 << 40,
        description="a log file this large is renamed to NAME.log.1, that one to NAME.log.2, ...",
    )
    num_log_files: int = Field(
        4, ge=1, le=100, description="log files of a process, the one in use among them"
    )


class CoefficientSettings(Settings):
    """Times of an engine step; see `StepCoefficients`."""

    fixed_s: float = Field(ge=0)
    prefill_token_s: float = Field(ge=0)
    prefill_attention_s: float = Field(0.0, ge=0)
    decode_token_s: float = Field(ge=0)
    decode_context_token_s: float = Field(0.0, ge=0)
    relative_error: float = Field(0.0, ge=0)

    def to_coefficients(self) -> StepCoefficients:
        return StepCoefficients(**self.model_dump())


class ModelChoice(Settings):
    """Which model, for routers too: they tokenise."""

    model: str = Field("demo", description="`demo`, `demo-draft`, or a model directory")


def _check_device(device: str) -> str:
    if not DEVICE.fullmatch(device):
        raise ValueError("device is cpu, cuda, or cuda:N for one GPU of several")
    return device


Device = Annotated[str, AfterValidator(_check_device)]


class EngineSettings(ModelChoice):
    """Which engine, on which model, with how much KV memory."""

    override_config: OverrideConfig = None
    engine: Literal["torch", "timed"] = Field(
        "torch", description="`timed` computes nothing: its steps take the time `coefficients` say"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of weights and KV"
    )
    device: Device = Field(
        "cpu", description="cpu, cuda (rank i of a node on its GPU i), or cuda:N for one rank"
    )
    memory_fraction: float = Field(
        0.9, gt=0, le=1, description="of a GPU's memory, for weights, steps and KV together"
    )
    block_size: BlockSize = DEFAULT_BLOCK_SIZE
    block_order: Literal["tokens", "heads"] = Field(
        "tokens", description="what comes first in a KV block; `heads` needs a GPU"
    )
    compile: bool = Field(
        False, description="run the layers through torch.compile; needs a GPU and one rank"
    )
    num_blocks: int | None = Field(
        None,
        ge=1,
        description=f"KV blocks of a worker; null: {DEFAULT_NUM_BLOCKS} on the CPU, "
        "what memory_fraction leaves room for on a GPU",
    )
    tp: int = Field(1, ge=1, le=MAX_PARALLEL, description="tensor parallel ranks of a stage")
    pp: int = Field(1, ge=1, le=MAX_PARALLEL, description="pipeline stages")
    prefix_reuse: bool = Field(True, description="keep KV of past prompts and use it again")
    coefficients: CoefficientSettings | None = Field(
        None, description="step times; left out: measured at start (torch), required by timed"
    )

    @model_validator(mode="after")
    def _timed_needs_coefficients(self) -> Self:
        if self.engine == "timed" and self.coefficients is None:
            raise ValueError("engine: timed needs coefficients")
        return self

    @model_validator(mode="after")
    def _heads_come_first_on_gpus(self) -> Self:
        if self.block_order == "heads" and (self.device == "cpu" or self.engine != "torch"):
            raise ValueError(
                f"block_order heads needs engine torch on a GPU; got {self.engine} on {self.device}"
            )
        return self

    @model_validator(mode="after")
    def _whole_models_on_gpus_are_compiled(self) -> Self:
        if self.compile and (self.device == "cpu" or self.engine != "torch"):
            raise ValueError(
                f"compile needs engine torch on a GPU; got {self.engine} on {self.device}: the "
                "engine of the CPU has compiled passes of its own"
            )
        if self.compile and self.num_ranks > 1:
            raise ValueError(
                f"compile needs one rank, and tp {self.tp}, pp {self.pp} are {self.num_ranks}, "
                "which exchange numbers within layers: that cannot be compiled"
            )
        return self

    @model_validator(mode="after")
    def _ranks_have_gpus_of_their_own(self) -> Self:
        if ":" in self.device and self.num_ranks > 1:
            raise ValueError(
                f"device {self.device} is one GPU, and each of {self.num_ranks} ranks (tp "
                f"{self.tp}, pp {self.pp}) needs its own: give device: cuda"
            )
        return self

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    @property
    def host_num_blocks(self) -> int:
        """KV blocks, if they lie in the memory of the host."""
        return self.num_blocks or DEFAULT_NUM_BLOCKS

    @property
    def planned_num_blocks(self) -> int | None:
        """KV blocks that are known before the start; None: those that the GPU has room for."""
        decides_gpu = self.engine == "torch" and self.device != "cpu"
        return self.num_blocks if decides_gpu else self.host_num_blocks


SloName = Annotated[
    str, Field(pattern=r"^[!-~]([ -~]{0,62}[!-~])?$", description="what clients ask for")
]


class SloClass(Settings):
    """What requests of one class are promised, and how many of them must get it."""

    name: SloName
    ttft_s: float = Field(gt=0, description="request received to first token sent")
    tpot_s: float = Field(gt=0, description="mean gap between tokens after the first")
    attainment: float = Field(0.9, gt=0, le=1, description="share of requests that must meet both")


POLICY = "what is least where a request goes: least_total_time or least_requests"


class RouterPorts(Settings):
    """Where a router listens."""

    host: Host = Field("127.0.0.1", description="loopback, or any address with insecure")
    insecure: bool = Field(False, description=INSECURE)
    port: int = Field(7450, ge=0, le=65535, description="clients; 0 picks a free port")
    internal_port: int = Field(
        7451, ge=0, le=65535, description="workers and `pdserve status`; 0 picks a free port"
    )
    metrics_port: int | None = Field(
        default_factory=lambda earlier: 0 if earlier.get("port") == 0 else 7452,
        ge=0,
        le=65535,
        description="Prometheus; 0 (the default where port is 0) picks a free one; null: none",
    )

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        check_binding(self.host, insecure=self.insecure)
        if self.port and self.port == self.internal_port:
            raise ValueError("port and internal_port must differ")
        return self


class ServedModel(ModelChoice):
    """The model as clients know it."""

    model_name: str = Field("", description="name that clients ask for; empty: the model's own")


class RouterLimits(Settings):
    """What a router lets in, and what it promises."""

    policy: PolicyName = Field("least_total_time", description=POLICY)
    max_num_requests: int = Field(1024, ge=1, description="in flight at once; more are refused")
    max_num_waiting: int | None = Field(
        None,
        ge=0,
        description="without a first token yet; more are refused; 0 or null: no limit",
    )
    max_wait_s: float | None = Field(
        None, ge=0, description="predicted wait that is refused; 0 or null: timers.queue_s"
    )
    max_rate: float | None = Field(
        None,
        ge=0,
        description="requests/s taken in the long run; more are refused; 0 or null: no limit",
    )
    max_burst: int | None = Field(
        None, ge=1, description="requests that max_rate lets in at once; null: those of 10 s"
    )
    slo: tuple[SloClass, ...] = Field(
        (),
        max_length=16,
        description="classes of requests and what they are promised; first: default",
    )
    max_prompt_chars: int = Field(2_000_000, ge=1, description="longer prompts are refused")
    max_num_attempts: int = Field(
        3, ge=1, le=10, description="tries at one request when workers die under it"
    )

    @field_validator("slo")
    @classmethod
    def _have_own_names(cls, slo: tuple[SloClass, ...]) -> tuple[SloClass, ...]:
        if len({each.name for each in slo}) < len(slo):
            raise ValueError("each class needs a name of its own")
        return slo


# Fields come in the order from the last base to the first: a settings file begins with the place.
class RouterSettings(ProcessSettings, RouterLimits, ServedModel, RouterPorts):
    """One router."""

    router_id: str = "router-0"
    log_file: str = Field("", description=LOG_FILE)


class WorkerPlace(Settings):
    """Which worker it is, where it listens, what it computes with."""

    role: Role
    reads: Reads = Field(
        default_factory=lambda earlier: READS_OF_ROLE[earlier.get("role", Role.DECODE)],
        description="whose prompts: others (prefill), own (decode: hands none on), none (decode: "
        "reads its own only while there is no prefill worker)",
    )
    worker_id: str = Field(min_length=1, max_length=64)
    host: Host = "127.0.0.1"
    insecure: bool = Field(False, description=INSECURE)
    port: int = Field(0, ge=0, le=65535)
    metrics_port: int | None = Field(
        0, ge=0, le=65535, description="Prometheus; 0 picks a free one; null: none"
    )
    kv_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="tcp transport; rank i of this node has this port + i; 0 picks free ones",
    )
    routers: tuple[Address, ...] = Field(
        (),
        description="host:port of routers' internal services; all addresses of a name are taken",
    )
    engine: EngineSettings = EngineSettings()
    ranks: RankSettings = Field(RankSettings(), description="where the ranks of a worker run")

    @model_validator(mode="after")
    def _check_binding(self) -> Self:
        check_binding(self.host, insecure=self.insecure)
        check_advertised(self.host)
        return self

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        check_ranks(self.ranks, self.engine.tp, self.engine.pp, insecure=self.insecure)
        last = self.kv_port_of_rank(self.num_local_ranks - 1)
        if last > MAX_PORT:
            raise ValueError(
                f"kv_port: the {self.num_local_ranks} ranks here take one port each, counted up "
                f"from {self.kv_port} to {last}, and {MAX_PORT} is the last one"
            )
        return self

    def kv_port_of_rank(self, index: int) -> int:
        """Where the rank `index` of this node lets others read its KV by TCP; 0: any free port."""
        return self.kv_port + index if self.kv_port else 0

    @property
    def num_local_ranks(self) -> int:
        """Of the worker's ranks, those that this process hosts."""
        return self.ranks.per_node or self.engine.num_ranks

    @model_validator(mode="after")
    def _check_reads(self) -> Self:
        if (self.role is Role.PREFILL) != (self.reads is Reads.OTHERS):
            raise ValueError(
                f"reads: a prefill worker reads others, a decode worker own or none; got "
                f"{self.reads} for role {self.role}"
            )
        return self


class Transports(Settings):
    """How KV travels."""

    transports: tuple[TransportName, ...] = Field(
        ("shm", "tcp"),
        min_length=1,
        description="how KV may travel, best first: shm, tcp, collective",
    )


class WorkerLimits(Settings):
    """What a worker takes at once."""

    renamed: ClassVar[Mapping[str, str]] = {"max_num_waiting": "max_num_queued"}

    max_num_requests: int = Field(64, ge=1, description="computed at once by a worker")
    max_num_queued: int = Field(256, ge=1, description="queued at a worker; more are refused")
    queue_order: QueueOrder | None = Field(
        None,
        description="who of those that wait here is next: fcfs, or deadline (who leaves first); "
        "null: deadline at prefill workers, fcfs at decode workers",
    )
    max_step_tokens: int = Field(512, ge=1, description="prompt tokens in one engine step at most")


class PrefillLimits(WorkerLimits):
    """What only prefill workers heed is in it, too."""

    overlap: Overlap = Field(
        "layers",
        description="when a prompt's KV travels: chunks (after each chunk), layers (within the "
        "last one, too), none (once all is read)",
    )


class DecodeLimits(WorkerLimits):
    """What only decode workers heed is in it, too."""

    max_local_prefill_tokens: int = Field(
        64, ge=0, description="read here what its own prefix cache leaves of a prompt, up to this"
    )
    corrupt_kv_blocks: int | Literal["all"] = Field(
        0, description="fault drill: flip a byte in this many blocks that each worker reads"
    )


class WorkerSettings(ProcessSettings, PrefillLimits, DecodeLimits, Transports, WorkerPlace):
    """One prefill or decode worker."""

    cpus: tuple[int, ...] = Field(
        (), description="CPU affinity; a share for each rank that runs here; empty: all"
    )
    log_file: str = Field("", description=LOG_FILE)

    def cpus_of_rank(self, index: int) -> tuple[int, ...]:
        """The cores of the rank `index` of this node; all of them if there are too few to share."""
        num_ranks = self.num_local_ranks
        if len(self.cpus) < num_ranks:
            return self.cpus
        first, last = (len(self.cpus) * each // num_ranks for each in (index, index + 1))
        return self.cpus[first:last]
