"""What one process is told at its start: a JSON or YAML object, checked before any work."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pdserve.config.base import Settings
from pdserve.config.binding import Address, Host, check_advertised, check_binding
from pdserve.config.override import OverrideConfig
from pdserve.config.timers import Timers
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.pair_cost import PolicyName
from pdserve.domain.waiting import QueueOrder

LogLevel = Literal["debug", "info", "warning", "error"]
MaxLogBytes = Annotated[
    int,
    Field(
        ge=64 << 10,
        le=1 << 40,
        description="a log file this large is renamed to NAME.log.1, that one to NAME.log.2, ...",
    ),
]
NumLogFiles = Annotated[
    int, Field(ge=1, le=100, description="log files of a process, the one in use among them")
]
DEFAULT_MAX_LOG_BYTES = 16 << 20
DEFAULT_NUM_LOG_FILES = 4
LOG_FILE = "where the process keeps its log, within the two limits below; empty: standard error"
TransportName = Literal["shm", "tcp"]


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


class EngineSettings(Settings):
    """Which engine, on which model, with how much KV memory."""

    model: str = Field("demo", description="`demo`, `demo-draft` or a model directory")
    override_config: OverrideConfig = None
    engine: Literal["torch", "timed"] = "torch"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    block_size: int = Field(16, ge=1, le=1024, description="tokens in a KV block")
    num_blocks: int = Field(1024, ge=1, description="KV blocks of this worker")
    tp: int = Field(1, ge=1, description="tensor parallel ranks of a stage")
    pp: int = Field(1, ge=1, description="pipeline stages")
    prefix_reuse: bool = True
    coefficients: CoefficientSettings | None = Field(
        None, description="step times; left out: measured at start (torch), required by timed"
    )

    @model_validator(mode="after")
    def _timed_needs_coefficients(self) -> Self:
        if self.engine == "timed" and self.coefficients is None:
            raise ValueError("engine: timed needs coefficients")
        return self


INSECURE = "listen on addresses that others can reach, without TLS and login"


class SloClassSettings(Settings):
    """What requests of one class are promised, and how many of them must get it."""

    name: str = Field(pattern=r"^[!-~]([ -~]{0,62}[!-~])?$", description="what clients ask for")
    ttft_s: float = Field(gt=0, description="request received to first token sent")
    tpot_s: float = Field(gt=0, description="mean gap between tokens after the first")
    attainment: float = Field(0.9, gt=0, le=1, description="share of requests that must meet both")


def _have_own_names(slo: tuple[SloClassSettings, ...]) -> tuple[SloClassSettings, ...]:
    if len({each.name for each in slo}) < len(slo):
        raise ValueError("each class needs a name of its own")
    return slo


SloClasses = Annotated[
    tuple[SloClassSettings, ...],
    Field(
        max_length=16, description="classes of requests and what they are promised; first: default"
    ),
    AfterValidator(_have_own_names),
]
MaxNumWaiting = Annotated[
    int | None,
    Field(ge=0, description="without a first token yet; more are refused; 0 or null: no limit"),
]
MaxWaitS = Annotated[
    float | None,
    Field(ge=0, description="predicted wait that is refused; 0 or null: timers.queue_s"),
]
MaxRate = Annotated[
    float | None,
    Field(
        ge=0,
        allow_inf_nan=False,
        description="requests/s taken in the long run; more are refused; 0 or null: no limit",
    ),
]
MaxBurst = Annotated[
    int | None,
    Field(ge=1, description="requests that max_rate lets in at once; null: those of 10 s"),
]


POLICY = "what is least where a request goes: least_total_time or least_requests"


QUEUE_ORDER = "who of those that wait here is next: fcfs, or deadline (who leaves first)"


def router_metrics_port(earlier: dict[str, Any]) -> int:
    """A router whose port is picked by the system may not be the only one: no port is fixed."""
    return 0 if earlier.get("port") == 0 else 7452


class RouterSettings(Settings):
    """One router."""

    router_id: str = "router-0"
    host: Host = "127.0.0.1"
    insecure: bool = Field(False, description=INSECURE)
    port: int = Field(7450, ge=0, le=65535, description="public service; 0 picks a free one")
    internal_port: int = Field(7451, ge=0, le=65535, description="workers and operators")
    metrics_port: int | None = Field(
        default_factory=router_metrics_port,
        ge=0,
        le=65535,
        description="Prometheus; 0 (the default where port is 0) picks a free one; null: none",
    )
    model: str = "demo"
    model_name: str = Field("", description="name that clients ask for; empty: the model's own")
    policy: PolicyName = Field("least_total_time", description=POLICY)
    max_num_requests: int = Field(1024, ge=1, description="in flight at once; more are refused")
    max_num_waiting: MaxNumWaiting = None
    max_wait_s: MaxWaitS = None
    max_rate: MaxRate = None
    max_burst: MaxBurst = None
    slo: SloClasses = ()
    max_prompt_chars: int = Field(2_000_000, ge=1)
    max_num_attempts: int = Field(3, ge=1, le=10)
    timers: Timers = Timers()
    log_level: LogLevel = "info"
    log_file: str = Field("", description=LOG_FILE)
    max_log_bytes: MaxLogBytes = DEFAULT_MAX_LOG_BYTES
    num_log_files: NumLogFiles = DEFAULT_NUM_LOG_FILES

    @model_validator(mode="after")
    def _check_binding(self) -> Self:
        check_binding(self.host, insecure=self.insecure)
        return self


ReadsName = Literal["others", "own", "none"]


def reads_of_role(earlier: dict[str, Any]) -> ReadsName:
    """A decode worker that is not told otherwise stands beside prefill workers."""
    return "others" if earlier.get("role") == "prefill" else "none"


def order_of_role(earlier: dict[str, Any]) -> QueueOrder:
    return "deadline" if earlier.get("role") == "prefill" else "fcfs"


class WorkerSettings(Settings):
    """One prefill or decode worker."""

    role: Literal["prefill", "decode"]
    reads: ReadsName = Field(
        default_factory=reads_of_role,
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
    kv_port: int = Field(0, ge=0, le=65535, description="tcp transport; 0 picks a free one")
    routers: tuple[Address, ...] = Field(
        (),
        description="host:port of routers' internal services; all addresses of a name are taken",
    )
    engine: EngineSettings = EngineSettings()
    transports: tuple[TransportName, ...] = Field(("shm", "tcp"), min_length=1)
    max_num_requests: int = Field(64, ge=1, description="computed at once")
    max_num_waiting: int = Field(256, ge=0, description="queued; more are refused")
    queue_order: QueueOrder = Field(default_factory=order_of_role, description=QUEUE_ORDER)
    max_step_tokens: int = Field(512, ge=1, description="prompt tokens in one step at most")
    max_local_prefill_tokens: int = Field(
        64, ge=0, description="decode: read here what its own prefix cache leaves, up to this"
    )
    corrupt_kv_blocks: int | Literal["all"] = Field(
        0, description="fault drill: flip a byte in this many blocks that this worker reads"
    )
    cpus: tuple[int, ...] = Field((), description="CPU affinity; empty: all")
    timers: Timers = Timers()
    log_level: LogLevel = "info"
    log_file: str = Field("", description=LOG_FILE)
    max_log_bytes: MaxLogBytes = DEFAULT_MAX_LOG_BYTES
    num_log_files: NumLogFiles = DEFAULT_NUM_LOG_FILES

    @model_validator(mode="after")
    def _check_binding(self) -> Self:
        check_binding(self.host, insecure=self.insecure)
        check_advertised(self.host)
        return self

    @model_validator(mode="after")
    def _check_reads(self) -> Self:
        if (self.role == "prefill") != (self.reads == "others"):
            raise ValueError(
                f"reads: a prefill worker reads others, a decode worker own or none; got "
                f"{self.reads} for role {self.role}"
            )
        return self
