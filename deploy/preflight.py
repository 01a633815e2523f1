"""What can be known to go wrong before any process starts."""

import errno
import importlib.util
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deploy.deployment import Deployment
from deploy.gpus import assign_gpus, visible_gpus
from kvtransfer.transports import installed_transports
from pdserve.config.binding import explain_listening, listen
from pdserve.config.processes import EngineSettings
from pdserve.domain.addresses import MAX_PORT
from pdserve.domain.errors import LocalFault
from pdserve.domain.layout import KvLayout, ShardedLayout
from pdserve.engine.model_faults import check_not_quantised
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_shape import kv_layout

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What the workers take of this machine's memory, all of their ranks together."""

    model_name: str
    num_blocks: int
    kv_bytes: int
    weight_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.kv_bytes + self.weight_bytes


def check_deployment(deployment: Deployment) -> Footprint:
    """Raise `LocalFault` for what cannot work here.

    That is a model, a port, ranks, GPUs or memory, or transports of which none is installed.
    """
    router = deployment.router
    for worker in deployment.workers:
        installed_transports(worker.settings.transports)
    engines = [worker.settings.engine for worker in deployment.workers]
    files = ModelFiles.open(router.model, engines[0].override_config)
    if any(engine.engine == "torch" for engine in engines):
        check_not_quantised(files.model_dir, files.config, files.weights)
    _check_metrics_ports(deployment)
    _check_port(router.host, router.port, "--port")
    _check_port(router.host, router.internal_port, "--internal-port")
    if router.metrics_port is not None:
        _check_port(router.host, router.metrics_port, "--set router.metrics_port=PORT")
    check_ranks(deployment, files)
    assign_gpus(deployment.workers, visible_gpus(), share=deployment.share_gpus)
    footprint = _footprint(deployment, files)
    _check_memory(footprint)
    return footprint


def check_ranks(deployment: Deployment, files: ModelFiles) -> None:
    """Raise `LocalFault` for a pool among whose ranks the model cannot be divided."""
    if not (cuts := divisions(deployment)):
        return
    try:
        from pdserve.engine.sharding import check_divisible  # torch: seconds, only for ranks
    except ModuleNotFoundError as error:
        raise LocalFault(
            f"engine: torch needs {error.name}; install the extra: pip install 'pdserve[worker]'"
        ) from None
    for tp, pp in sorted(cuts):
        check_divisible(files, tp, pp)


def divisions(deployment: Deployment) -> set[tuple[int, int]]:
    """All (tp, pp) by which workers divide a real model."""
    engines = [worker.settings.engine for worker in deployment.workers]
    return {(each.tp, each.pp) for each in engines if each.engine == "torch" and each.num_ranks > 1}


def check_ranks_if_possible(deployment: Deployment) -> list[str]:
    """As `check_ranks`, for workers that run elsewhere; what cannot be checked here, as notes."""
    if not divisions(deployment):
        return []
    engine = deployment.workers[0].settings.engine
    not_checked = "whether the model can be divided by tp and pp was not checked here"
    try:
        files = ModelFiles.open(deployment.router.model, engine.override_config)
    except LocalFault as fault:
        return [f"{not_checked}: {fault.message}"]
    if importlib.util.find_spec("torch") is None:
        return [f"{not_checked}: torch is not installed"]
    check_ranks(deployment, files)
    return []


def _footprint(deployment: Deployment, files: ModelFiles) -> Footprint:
    """Of the host's memory: what lies on GPUs is counted when they are there."""
    num_blocks = kv_bytes = weight_bytes = 0
    for worker in deployment.workers:
        if worker.computes_on_gpus:
            continue
        engine = worker.settings.engine
        layout = kv_layout(files.config, block_size=engine.block_size, dtype=engine.dtype)
        num_blocks += engine.host_num_blocks
        kv_bytes += engine.host_num_blocks * _block_bytes(layout, engine)
        if engine.engine == "torch":
            weight_bytes += num_weights(files.weights) * layout.item_bytes
    name = deployment.router.model_name or files.name
    return Footprint(
        model_name=name, num_blocks=num_blocks, kv_bytes=kv_bytes, weight_bytes=weight_bytes
    )


def _block_bytes(whole: KvLayout, engine: EngineSettings) -> int:
    """Of one KV block at all ranks: some hold the same heads if there are more ranks than heads."""
    if engine.engine == "timed" or engine.num_ranks == 1:
        return whole.block_bytes
    try:
        sharded = ShardedLayout(whole=whole, tp=engine.tp, pp=engine.pp)
    except ValueError as error:
        raise LocalFault(f"tp {engine.tp}, pp {engine.pp}: {error}") from None
    return sum(sharded.rank(rank).layout.block_bytes for rank in range(sharded.num_ranks))


def num_weights(paths: Iterable[Path]) -> int:
    """Values in safetensors files, which are known to be whole."""
    total = 0
    for path in paths:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(each["shape"]) for name, each in header.items() if name[:2] != "__")
    return total


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
    if available is not None and footprint.num_bytes > available:
        raise LocalFault(
            f"{footprint.num_blocks:,} KV blocks need {_gib(footprint.kv_bytes)} and the weights "
            f"of all workers {_gib(footprint.weight_bytes)}, but {_gib(available)} of memory is "
            "available: lower num_blocks or the replicas"
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
