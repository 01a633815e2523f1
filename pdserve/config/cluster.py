"""One file for a whole cluster on one machine: a router, a prefill pool and a decode pool.

Its fields are those of the processes' own settings (`pdserve.config.processes`), in one place each.
"""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, Field

from pdserve.config.base import Settings, lay_over, parse_settings
from pdserve.config.processes import (
    MAX_PARALLEL,
    BlockSize,
    DecodeLimits,
    EngineSettings,
    PrefillLimits,
    ProcessSettings,
    RouterLimits,
    RouterPorts,
    RouterSettings,
    ServedModel,
    Transports,
    WorkerSettings,
)
from pdserve.domain.addresses import is_loopback
from pdserve.domain.messages import READS_OF_ROLE, Reads, Role


class RouterPool(RouterLimits, RouterPorts):
    """The router."""


class WorkerPool(Settings):
    """What the workers of one role share."""

    replicas: int = Field(1, ge=0, description="worker processes")
    num_blocks: int | None = Field(
        None, ge=1, description="KV blocks of each worker; left out: num_blocks above"
    )
    block_size: BlockSize | None = Field(
        None, description="tokens in a KV block; left out: block_size above"
    )
    tp: int | None = Field(
        None, ge=1, le=MAX_PARALLEL, description="tensor parallel ranks; left out: tp above"
    )
    pp: int | None = Field(
        None, ge=1, le=MAX_PARALLEL, description="pipeline stages; left out: pp above"
    )
    metrics_port: int | None = Field(
        0,
        ge=0,
        le=65535,
        description="Prometheus: the first worker's, the others count up; 0: free ones; null: none",
    )

    def nth(self, worker: WorkerSettings, index: int) -> WorkerSettings:
        """The settings of number `index` among workers that are told the same as `worker`."""
        port = self.metrics_port + index if self.metrics_port else self.metrics_port
        own = {"worker_id": f"{worker.role}-{index}", "metrics_port": port}
        return worker.model_copy(update=own)


class PrefillPool(PrefillLimits, WorkerPool):
    """Workers that read prompts. With 0 replicas the decode workers read them (colocated)."""


class DecodePool(DecodeLimits, WorkerPool):
    """Workers that write answers."""

    replicas: int = Field(1, ge=1, description="worker processes")


class ClusterSettings(ProcessSettings, Transports, EngineSettings, ServedModel):
    """A local cluster. Every field may be left out."""

    start_s: float = Field(120.0, gt=0, description="all processes must serve within this time")
    log_dir: str = Field(
        "", description="one log file a process; empty: a temporary folder, removed on a clean exit"
    )
    share_gpus: bool = Field(
        False, description="workers may have GPUs of this machine together, within memory_fraction"
    )
    router: RouterPool = Field(RouterPool(), description="where clients and workers connect")
    prefill: PrefillPool = Field(PrefillPool(), description="0 replicas: colocated serving")
    decode: DecodePool = Field(DecodePool(), description="at least 1 replica")

    def router_settings(self) -> RouterSettings:
        return RouterSettings.model_validate(self.router_data())

    def worker_settings(self, router: str) -> tuple[WorkerSettings, ...]:
        """Settings of every worker; `router` is the router's internal host:port, or ""."""
        own = {"routers": (router,) if router else ()}
        alike = [WorkerSettings.model_validate(self.worker_data(role) | own) for role in Role]
        return tuple(
            self.pool(each.role).nth(each, index)
            for each in alike
            for index in range(self.pool(each.role).replicas)
        )

    def pool(self, role: Role) -> PrefillPool | DecodePool:
        return self.prefill if role is Role.PREFILL else self.decode

    def router_data(self, *, only_given: bool = False) -> dict[str, Any]:
        """What is said here of the router, as data of `RouterSettings`; defaults, too, or not."""
        kind = RouterSettings
        return _data_of(kind, self, only_given) | _data_of(kind, self.router, only_given)

    def worker_data(self, role: Role, *, only_given: bool = False) -> dict[str, Any]:
        """The same of each worker of a role, as data of `WorkerSettings`."""
        pool = self.pool(role)
        reads_own = role is Role.DECODE and not self.prefill.replicas
        engine = _data_of(EngineSettings, self, only_given)
        own = {"num_blocks": pool.num_blocks, "block_size": pool.block_size}
        own |= {"tp": pool.tp, "pp": pool.pp}
        engine |= {name: value for name, value in own.items() if value is not None}
        return {
            **_data_of(WorkerSettings, self, only_given),
            **_data_of(WorkerSettings, pool, only_given),
            "role": role,
            "reads": Reads.OWN if reads_own else READS_OF_ROLE[role],
            "worker_id": role,
            "engine": engine,
            # Only the router may be open to others: its workers are on this machine.
            "host": self.router.host if is_loopback(self.router.host) else "127.0.0.1",
        }


def _data_of(kind: type[Settings], settings: Settings, only_given: bool) -> dict[str, Any]:
    """What `settings` has for fields of `kind`."""
    return settings.model_dump(include=set(kind.model_fields), exclude_unset=only_given)


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
    values = [(name, getattr(settings, name)) for name in type(settings).model_fields]
    for name, value in sorted(values, key=lambda each: isinstance(each[1], BaseModel)):
        field = type(settings).model_fields[name]
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
