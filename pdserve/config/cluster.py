"""One file for a whole cluster on one machine: a router, a prefill pool and a decode pool."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import yaml
from pydantic import BaseModel, Field, model_validator

from pdserve.config.base import Settings, lay_over, parse_settings
from pdserve.config.binding import Host, check_binding
from pdserve.config.override import OverrideConfig
from pdserve.config.processes import (
    DEFAULT_MAX_LOG_BYTES,
    DEFAULT_NUM_LOG_FILES,
    POLICY,
    QUEUE_ORDER,
    CoefficientSettings,
    EngineSettings,
    LogLevel,
    MaxBurst,
    MaxLogBytes,
    MaxNumWaiting,
    MaxRate,
    MaxWaitS,
    NumLogFiles,
    ReadsName,
    RouterSettings,
    SloClasses,
    TransportName,
    WorkerSettings,
    router_metrics_port,
)
from pdserve.config.timers import Timers
from pdserve.domain.addresses import MAX_PORT, is_loopback
from pdserve.domain.pair_cost import PolicyName
from pdserve.domain.waiting import QueueOrder

Role = Literal["prefill", "decode"]


class RouterPool(Settings):
    """The router."""

    host: Host = Field("127.0.0.1", description="loopback, or any address with insecure")
    insecure: bool = Field(False, description="let other machines in, without TLS and login")
    port: int = Field(7450, ge=0, le=65535, description="clients; 0 picks a free port")
    internal_port: int = Field(
        7451, ge=0, le=65535, description="workers and `pdserve status`; 0 picks a free port"
    )
    metrics_port: int | None = Field(
        default_factory=router_metrics_port,
        ge=0,
        le=65535,
        description="Prometheus; 0 (the default where port is 0) picks a free one; null: none",
    )
    policy: PolicyName = Field("least_total_time", description=POLICY)
    max_num_requests: int = Field(1024, ge=1, description="in flight at once; more are refused")
    max_num_attempts: int = Field(
        3, ge=1, le=10, description="tries at one request when workers die under it"
    )
    max_num_waiting: MaxNumWaiting = None
    max_wait_s: MaxWaitS = None
    max_rate: MaxRate = None
    max_burst: MaxBurst = None
    slo: SloClasses = ()

    @model_validator(mode="after")
    def _check_binding(self) -> Self:
        check_binding(self.host, insecure=self.insecure)
        return self


class WorkerPool(Settings):
    """What the workers of one role share."""

    replicas: int = Field(1, ge=0, le=64, description="worker processes")
    num_blocks: int = Field(1024, ge=1, description="KV blocks of each worker")
    max_num_requests: int = Field(64, ge=1, description="computed at once by each worker")
    max_num_waiting: int = Field(256, ge=0, description="queued at each worker; more are refused")
    max_step_tokens: int = Field(512, ge=1, description="prompt tokens in one engine step at most")
    metrics_port: int | None = Field(
        0,
        ge=0,
        le=65535,
        description="Prometheus: the first worker's, the others count up; 0: free ones; null: none",
    )

    def nth_metrics_port(self, index: int) -> int | None:
        """Of the pool's worker number `index`."""
        return self.metrics_port + index if self.metrics_port else self.metrics_port


class PrefillPool(WorkerPool):
    """Workers that read prompts. With 0 replicas the decode workers read them (colocated)."""

    queue_order: QueueOrder = Field("deadline", description=QUEUE_ORDER)


class DecodePool(WorkerPool):
    """Workers that write answers."""

    replicas: int = Field(1, ge=1, le=64, description="worker processes")
    queue_order: QueueOrder = Field("fcfs", description=QUEUE_ORDER)
    max_local_prefill_tokens: int = Field(
        64, ge=0, description="read here what its own prefix cache leaves of a prompt, up to this"
    )
    corrupt_kv_blocks: int | Literal["all"] = Field(
        0, description="fault drill: flip a byte in this many blocks that each worker reads"
    )


class ClusterSettings(Settings):
    """A local cluster. Every field may be left out."""

    model: str = Field("demo", description="`demo`, `demo-draft`, or a model directory")
    model_name: str = Field("", description="name that clients ask for; empty: the model's own")
    override_config: OverrideConfig = None
    engine: Literal["torch", "timed"] = Field(
        "torch", description="`timed` computes nothing: its steps take the time `coefficients` say"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of weights and KV"
    )
    device: str = Field("cpu", description="torch device of every worker")
    block_size: int = Field(16, ge=1, le=1024, description="tokens in a KV block")
    prefix_reuse: bool = Field(True, description="keep KV of past prompts and use it again")
    coefficients: CoefficientSettings | None = Field(
        None, description="step times; left out: measured at start (torch), required by timed"
    )
    transports: tuple[TransportName, ...] = Field(
        ("shm", "tcp"), min_length=1, description="how KV may travel, best first"
    )
    start_s: float = Field(120.0, gt=0, description="all processes must serve within this time")
    log_level: LogLevel = Field("info", description="debug, info, warning or error")
    log_dir: str = Field(
        "", description="one log file a process; empty: a temporary folder, removed on a clean exit"
    )
    max_log_bytes: MaxLogBytes = DEFAULT_MAX_LOG_BYTES
    num_log_files: NumLogFiles = DEFAULT_NUM_LOG_FILES
    router: RouterPool = Field(RouterPool(), description="where clients and workers connect")
    prefill: PrefillPool = Field(PrefillPool(), description="0 replicas: colocated serving")
    decode: DecodePool = Field(DecodePool(), description="at least 1 replica")
    timers: Timers = Field(Timers(), description="seconds")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.engine == "timed" and self.coefficients is None:
            raise ValueError("engine: timed needs coefficients")
        if self.router.port and self.router.port == self.router.internal_port:
            raise ValueError("router.port and router.internal_port must differ")
        self._check_metrics_ports()
        return self

    def _check_metrics_ports(self) -> None:
        ports = [self.router.port, self.router.internal_port, self.router.metrics_port]
        for pool in (self.prefill, self.decode):
            ports += [pool.nth_metrics_port(index) for index in range(pool.replicas)]
        given = [port for port in ports if port]
        if max(given, default=0) > MAX_PORT:
            raise ValueError(f"metrics_port plus replicas must stay within {MAX_PORT}")
        if len(set(given)) < len(given):
            raise ValueError(
                "a metrics_port must differ from all other ports; the workers of a pool take one "
                "each, counted up from the first"
            )

    def router_settings(self) -> RouterSettings:
        return RouterSettings(
            host=self.router.host,
            insecure=self.router.insecure,
            port=self.router.port,
            internal_port=self.router.internal_port,
            metrics_port=self.router.metrics_port,
            policy=self.router.policy,
            max_num_waiting=self.router.max_num_waiting,
            max_wait_s=self.router.max_wait_s,
            max_rate=self.router.max_rate,
            max_burst=self.router.max_burst,
            slo=self.router.slo,
            model=self.model,
            model_name=self.model_name,
            max_num_requests=self.router.max_num_requests,
            max_num_attempts=self.router.max_num_attempts,
            timers=self.timers,
            log_level=self.log_level,
            max_log_bytes=self.max_log_bytes,
            num_log_files=self.num_log_files,
        )

    def worker_settings(self, router: str) -> tuple[WorkerSettings, ...]:
        """Settings of every worker; `router` is the router's internal host:port, or ""."""
        roles: tuple[Role, ...] = ("prefill", "decode")
        return tuple(
            self._worker_settings(role, index, router)
            for role in roles
            for index in range(self.pool(role).replicas)
        )

    def pool(self, role: Role) -> WorkerPool:
        return self.prefill if role == "prefill" else self.decode

    def _reads(self, role: Role) -> ReadsName:
        if role == "prefill":
            return "others"
        return "none" if self.prefill.replicas else "own"

    def _worker_settings(self, role: Role, index: int, router: str) -> WorkerSettings:
        pool = self.pool(role)
        return WorkerSettings(
            role=role,
            reads=self._reads(role),
            worker_id=f"{role}-{index}",
            # Only the router may be open to others: its workers are on this machine.
            host=self.router.host if is_loopback(self.router.host) else "127.0.0.1",
            routers=(router,) if router else (),
            engine=EngineSettings(
                model=self.model,
                override_config=self.override_config,
                engine=self.engine,
                dtype=self.dtype,
                device=self.device,
                block_size=self.block_size,
                num_blocks=pool.num_blocks,
                prefix_reuse=self.prefix_reuse,
                coefficients=self.coefficients,
            ),
            transports=self.transports,
            metrics_port=pool.nth_metrics_port(index),
            **pool.model_dump(exclude={"replicas", "num_blocks", "metrics_port"}),
            timers=self.timers,
            log_level=self.log_level,
            max_log_bytes=self.max_log_bytes,
            num_log_files=self.num_log_files,
        )


def parse_cluster_settings(
    data: object, flags: Mapping[str, object], *, source: str
) -> ClusterSettings:
    """A cluster file's content with `flags` ("router.port": 7450) laid over it.

    Raises `LocalFault` naming source, field and rule.
    """
    data = {} if data is None else data  # a file of comments only
    return parse_settings(ClusterSettings, lay_over(data, flags.items()), source=source)


def example_yaml() -> str:
    """A cluster file that holds every field at its default, each with its meaning."""
    lines = ["# A pdserve cluster on this machine: `pdserve up cluster.yaml`."]
    lines += ["# Every field may be left out; these are the defaults.", ""]
    return "\n".join([*lines, *_example_lines(ClusterSettings())]) + "\n"


def _example_lines(settings: BaseModel, indent: str = "") -> Iterator[str]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        comment = field.description or ""
        if isinstance(value, BaseModel):
            yield ""
            about = (type(value).__doc__ or comment).strip().replace("\n", " ")
            yield from textwrap.wrap(
                about, 96, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
            )
            yield f"{indent}{name}:"
            yield from _example_lines(value, indent + "  ")
            continue
        shown = list(value) if isinstance(value, tuple) else value
        written = yaml.safe_dump(shown, default_flow_style=True).removesuffix("...\n").strip()
        text = f"{name}: {written}" if value is not None else f"# {name}:"
        yield f"{indent}{text:<28}  # {comment}" if comment else f"{indent}{text}"
