"""What can be known to go wrong before any process starts."""

import errno
from dataclasses import dataclass
from pathlib import Path

from deploy.deployment import Deployment
from pdserve.config.binding import explain_listening, listen
from pdserve.domain.addresses import MAX_PORT
from pdserve.domain.errors import LocalFault
from pdserve.engine.model_faults import check_not_quantised
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_shape import kv_layout

MEMINFO = Path("/proc/meminfo")
DEV = Path("/dev")


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the cluster will take; `kv_bytes` of all workers together."""

    model_name: str
    num_blocks: int
    block_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def check_deployment(deployment: Deployment) -> Footprint:
    """Raise `LocalFault` for a model, a port, GPUs or an amount of memory that cannot work here."""
    router = deployment.router
    engines = [worker.settings.engine for worker in deployment.workers]
    files = ModelFiles.open(router.model, engines[0].override_config)
    if any(engine.engine == "torch" for engine in engines):
        check_not_quantised(files.model_dir, files.config, files.weights)
    layout = kv_layout(files.config, block_size=engines[0].block_size, dtype=engines[0].dtype)
    footprint = Footprint(
        router.model_name or files.name,
        sum(engine.planned_num_blocks or 0 for engine in engines),
        layout.block_bytes,
    )
    _check_metrics_ports(deployment)
    _check_port(router.host, router.port, "--port")
    _check_port(router.host, router.internal_port, "--internal-port")
    if router.metrics_port is not None:
        _check_port(router.host, router.metrics_port, "--set router.metrics_port=PORT")
    _check_gpus(deployment)
    if all(engine.device == "cpu" for engine in engines):
        _check_memory(footprint)
    return footprint


def _check_metrics_ports(deployment: Deployment) -> None:
    """No two processes have one, and none is beyond the last."""
    router = deployment.router
    taken = {router.port: "router.port", router.internal_port: "router.internal_port"}
    wanted = [(each.name, each.settings.metrics_port) for each in deployment.workers]
    for name, port in [("router", router.metrics_port), *wanted]:
        if not port:
            continue
        if port in taken or port > MAX_PORT:
            why = f"{taken[port]} has" if port in taken else f"is above {MAX_PORT}"
            raise LocalFault(
                f"metrics_port: {name} would get {port}, which {why}; the workers of a pool take "
                "one each, counted up from the first"
            )
        taken[port] = f"{name}.metrics_port"


def _check_gpus(deployment: Deployment) -> None:
    """A plan for GPUs that this machine does not have."""
    workers = [
        worker
        for worker in deployment.workers
        if worker.num_gpus
        and worker.settings.engine.engine == "torch"
        and worker.settings.engine.device != "cpu"
    ]
    needed, found = sum(worker.num_gpus for worker in workers), num_gpus()
    if needed > found:
        types = ", ".join(sorted({worker.gpu for worker in workers}))
        raise LocalFault(
            f"the plan needs {needed} GPUs ({types}); this machine has {found}: start it where "
            "they are (--backend ray, pdserve render kubernetes), use --scale if fewer will do, or "
            "try it here with --device cpu (real tokens) or --engine timed (the plan's step times)"
        )


def num_gpus() -> int:
    """GPUs of this machine that the kernel shows, NVIDIA's and AMD's."""
    nvidia = [each for each in DEV.glob("nvidia*") if each.name[len("nvidia") :].isdigit()]
    return len(nvidia) + len(list(DEV.glob("dri/renderD*")) if (DEV / "kfd").exists() else [])


def _check_port(host: str, port: int, flag: str) -> None:
    try:
        listen(host, port).close()
    except OSError as error:
        raise LocalFault(_port_problem(host, port, flag, error)) from None


def _port_problem(host: str, port: int, flag: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is in use: stop what listens there (is a cluster up already? "
            f"see `pdserve status`), or choose another with {flag}"
        )
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this user has: choose one above 1023 ({flag})"
    return f"cannot listen on {explain_listening(host, port, error)}"


def _check_memory(footprint: Footprint) -> None:
    available = available_bytes()
    if available is not None and footprint.kv_bytes > available:
        raise LocalFault(
            f"{footprint.num_blocks:,} KV blocks of {footprint.block_bytes:,} bytes need "
            f"{_gib(footprint.kv_bytes)}, but {_gib(available)} of memory is available: lower "
            "num_blocks or the replicas"
        )


def available_bytes() -> int | None:
    """Memory that processes can still take, swap left out; None where the system does not tell."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
