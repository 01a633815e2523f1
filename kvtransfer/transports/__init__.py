"""Ways to read another worker's KV memory; `open_transports` picks those that this host has."""

from collections.abc import Callable, Sequence

import structlog

from kvtransfer.transports.base import NOBODY, End, Transport
from kvtransfer.transports.faulty import FaultyTransport
from kvtransfer.transports.nixl import NixlTransport
from kvtransfer.transports.nixl_agent import is_installed
from kvtransfer.transports.shm import ShmTransport
from kvtransfer.transports.tcp import TcpTransport
from kvtransfer.transports.tcp_server import TcpLimits
from pdserve.config.processes import WorkerSettings
from pdserve.config.timers import Timers
from pdserve.domain.errors import LocalFault
from pdserve.domain.messages import Role

log = structlog.get_logger(__name__)


def _shm(host: str, port: int, timers: Timers, end: End) -> Transport:
    return ShmTransport()


def _tcp(host: str, port: int, timers: Timers, end: End) -> Transport:
    limits = TcpLimits(
        connect_timeout_s=timers.connect_s,
        idle_timeout_s=timers.transfer_idle_s,
        total_timeout_s=timers.transfer_s,
    )
    return TcpTransport(host, port=port, end=end, limits=limits)


def _collective(host: str, port: int, timers: Timers, end: End) -> Transport:
    from kvtransfer.transports.collective import CollectiveTransport  # torch: only who needs it
    from kvtransfer.transports.collective_lane import LaneLimits

    limits = LaneLimits(
        connect_timeout_s=timers.connect_s,
        idle_timeout_s=timers.transfer_idle_s,
        total_timeout_s=timers.transfer_s,
    )
    return CollectiveTransport(host, end=end, limits=limits)


def _nixl(host: str, port: int, timers: Timers, end: End) -> Transport:
    return NixlTransport(idle_timeout_s=timers.transfer_idle_s, total_timeout_s=timers.transfer_s)


_MAKERS: dict[str, Callable[[str, int, Timers, End], Transport]] = {
    "shm": _shm,
    "tcp": _tcp,
    "collective": _collective,
    "nixl": _nixl,
}


def open_transports(
    names: Sequence[str], host: str, port: int = 0, *, timers: Timers, end: End = NOBODY
) -> tuple[Transport, ...]:
    """The named transports, in order of preference; `host` and `port` are where tcp listens.
    `end` is this process, as those will know it whom it reads from.

    Timers are for the others: shm copies from memory, where nobody can keep it waiting. What is not
    installed is left out, and told.

    Raises `LocalFault` for a name that there is no transport of, and if none is left.
    """
    unknown = [name for name in names if name not in _MAKERS]
    if unknown:
        raise LocalFault(f"no transport {unknown[0]!r}; there are {', '.join(_MAKERS)}")
    installed = installed_transports(names)
    for name in names:
        if name not in installed:
            log.warning("transport.left_out", transport=name, why=_missing(name))
    return tuple(_MAKERS[name](host, port, timers, end) for name in installed)


def installed_transports(names: Sequence[str]) -> list[str]:
    """Those that can be used here, in order; raises `LocalFault` if there are none."""
    installed = [name for name in names if name != NixlTransport.name or is_installed()]
    if not installed:
        raise LocalFault(_missing(names[0]))
    return installed


def _missing(name: str) -> str:
    return f"transport {name} needs its extra: pip install 'pdserve[{name}]'"


def worker_transports(settings: WorkerSettings, end: End) -> tuple[Transport, ...]:
    """Those that a rank of a worker moves KV by, damaging it if its settings say so."""
    port = settings.kv_port_of_rank(end.rank % settings.num_local_ranks)
    timers = settings.timers
    transports = open_transports(settings.transports, settings.host, port, timers=timers, end=end)
    if settings.corrupt_kv_blocks == 0 or settings.role is not Role.DECODE:
        return transports
    log.warning("drill.enabled", corrupt_kv_blocks=settings.corrupt_kv_blocks)
    return tuple(FaultyTransport(each, settings.corrupt_kv_blocks) for each in transports)
