"""What ends a read over a connection, and what whoever reads is told."""

import asyncio

import pytest

from kvtransfer.transports.requests import BadFrame, TokenAddress, read_within
from pdserve.domain.errors import TransferFailed
from pdserve.domain.messages import RemoteRegion

GOOD = {"host": "127.0.0.1", "port": "1", "token": "ab" * 16}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (TimeoutError(), "silent for 7 s"),
        (ConnectionResetError(), "the connection to the peer broke"),
        (BadFrame(), "the connection to the peer broke"),
    ],
)
async def test_a_fault_is_told_once_the_connection_was_given_up(
    fault: Exception, told: str
) -> None:
    faults: list[bool] = []
    with pytest.raises(TransferFailed, match=told):
        async with read_within(60, 7, lambda: faults.append(True)):
            raise fault
    assert faults == [True]


async def test_a_read_that_takes_too_long_in_all_is_told_as_that() -> None:
    faults: list[bool] = []
    with pytest.raises(TransferFailed, match=r"took longer than 0\.01 s"):
        async with read_within(0.01, 7, lambda: faults.append(True)):
            await asyncio.Event().wait()
    assert faults == [True]


async def test_a_read_that_is_given_up_or_refused_is_no_fault_of_the_connection() -> None:
    faults: list[bool] = []
    for end in (asyncio.CancelledError(), TransferFailed("not on offer")):
        with pytest.raises(type(end)):
            async with read_within(60, 7, lambda: faults.append(True)):
                raise end
    assert not faults


@pytest.mark.parametrize(
    "change",
    [
        {"port": "0"},
        {"port": "65536"},
        {"port": "x"},
        {"token": "ab"},
        {"token": "xy" * 16},
        {"host": ""},
    ],
)
def test_an_address_that_makes_no_sense_is_refused(change: dict[str, str]) -> None:
    region = RemoteRegion(transport="tcp", address=GOOD, num_blocks=1, block_bytes=1)
    assert TokenAddress.of(region).port == 1
    for address in ({**GOOD, **change}, {key: GOOD[key] for key in GOOD if key not in change}):
        bad = RemoteRegion(transport="tcp", address=address, num_blocks=1, block_bytes=1)
        with pytest.raises(TransferFailed, match="the peer's address"):
            TokenAddress.of(bad)
