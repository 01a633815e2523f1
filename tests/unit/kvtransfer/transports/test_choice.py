"""`open_transports` and `worker_transports`."""

from dataclasses import replace
from typing import Any

import pytest
import structlog

from kvtransfer import transports
from kvtransfer.transports import open_transports, worker_transports
from kvtransfer.transports.base import End, Transport
from kvtransfer.transports.faulty import FaultyTransport
from kvtransfer.transports.tcp import TcpTransport
from pdserve.config.processes import WorkerSettings
from pdserve.config.timers import Timers
from pdserve.domain.errors import LocalFault
from pdserve.domain.ids import Epoch
from pdserve.domain.messages import RemoteRegion

TCP = RemoteRegion(
    transport="tcp",
    address={"host": "127.0.0.1", "port": "5", "token": "00" * 16},
    num_blocks=1,
    block_bytes=8,
)


def test_transports_open_in_the_order_they_are_named() -> None:
    opened = open_transports(["tcp", "shm"], "127.0.0.1", timers=Timers())
    assert [transport.name for transport in opened] == ["tcp", "shm"]


def test_an_unknown_transport_is_a_fault_of_the_settings() -> None:
    with pytest.raises(LocalFault, match="pigeon"):
        open_transports(["shm", "pigeon"], "127.0.0.1", timers=Timers())


def test_a_transport_without_its_extra_is_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transports, "is_installed", lambda: False)
    with structlog.testing.capture_logs() as logs:
        opened = open_transports(["nixl", "tcp"], "127.0.0.1", timers=Timers())
    assert [transport.name for transport in opened] == ["tcp"]
    [entry] = logs
    assert entry["transport"] == "nixl"
    assert "pip install 'pdserve[nixl]'" in entry["why"]
    with pytest.raises(LocalFault, match=r"pip install 'pdserve\[nixl\]'"):
        open_transports(["nixl"], "127.0.0.1", timers=Timers())


@pytest.mark.parametrize(
    "address",
    [
        {},
        {"host": "127.0.0.1", "port": "5"},
        {"host": "127.0.0.1", "port": "x", "token": "00" * 16},
        {"host": "127.0.0.1", "port": "0", "token": "00" * 16},
        {"host": "127.0.0.1", "port": "65536", "token": "00" * 16},
        {"host": "127.0.0.1", "port": "5", "token": "00"},
        {"host": "127.0.0.1", "port": "5", "token": "zz" * 16},
        {"host": "", "port": "5", "token": "00" * 16},
    ],
)
def test_a_tcp_address_that_is_none_is_not_reached(address: dict[str, str]) -> None:
    (tcp,) = open_transports(["tcp"], "127.0.0.1", timers=Timers())
    assert tcp.can_reach(TCP)
    assert not tcp.can_reach(replace(TCP, address=address))


@pytest.mark.parametrize(("kv_port", "port"), [(0, 0), (7461, 7464)])
def test_each_rank_of_a_node_serves_at_a_port_of_its_own(kv_port: int, port: int) -> None:
    settings = worker_settings(role="prefill", kv_port=kv_port, engine={"tp": 4})
    [transport] = worker_transports(settings, End(Epoch(1), rank=3))
    assert isinstance(transport, TcpTransport)
    assert transport._port == port


@pytest.mark.parametrize(("role", "kind"), [("decode", FaultyTransport), ("prefill", TcpTransport)])
def test_the_drill_damages_what_ranks_read(role: str, kind: type[Transport]) -> None:
    settings = worker_settings(role=role, corrupt_kv_blocks=1, engine={"tp": 2})
    for rank in range(2):
        [transport] = worker_transports(settings, End(Epoch(1), rank=rank))
        assert type(transport) is kind


def worker_settings(**changes: Any) -> WorkerSettings:
    said = {"worker_id": "w", "transports": ("tcp",), **changes}
    return WorkerSettings.model_validate(said)
