"""Streams to prefill workers come and go without taking the process with them."""

import asyncio

import pytest
import structlog

from decode_worker.prefill_links import PrefillLinks
from pdserve.config.timers import Timers
from pdserve.domain.ids import Epoch, WorkerId
from pdserve.domain.messages import PrefillTarget
from pdserve.rpc.streams import PrefillLink
from tests.support.virtual_time import virtual
from tests.support.worker_pair import Sizes, WorkerPair, oracle

PROMPT = tuple(range(10, 40))
TARGET = PrefillTarget(worker_id=WorkerId("odd"), address="odd", epoch=Epoch(1))


@pytest.mark.parametrize("error", [ValueError("no such address"), OSError("no route")])
def test_link_that_fails_oddly_is_a_lost_worker(error: Exception) -> None:
    @virtual
    async def run() -> None:
        async with WorkerPair(Sizes(num_prefill=0)) as pair:

            async def fail(address: str) -> PrefillLink:
                raise error

            pair.links._connect = fail
            call = pair.submit(PROMPT, max_tokens=4, targets=(TARGET,))
            await call.completed()
            assert call.token_ids == oracle(PROMPT, call.submit.sampling)

    with structlog.testing.capture_logs():
        run()


@virtual
async def test_requests_share_one_link_and_a_lost_one_is_opened_again() -> None:
    async with WorkerPair() as pair:
        calls = [pair.submit((*PROMPT, i), max_tokens=4) for i in range(5)]
        for call in calls:
            await call.completed()
        assert len(pair.prefill[0].wires) == 1
        pair.prefill[0].cut()
        await asyncio.sleep(0.1)
        again = pair.submit(PROMPT[::-1], max_tokens=4)
        end = await again.completed()
        assert end.timeline.prefill_worker == "prefill-0"


@virtual
async def test_closing_does_not_wait_for_timers_nor_for_links_being_opened() -> None:
    async with WorkerPair(Sizes(num_prefill=0)) as pair:
        peer = await pair.script_prefill()

        async def connect(address: str) -> PrefillLink:
            if address == peer.name:
                return peer.connect()
            await asyncio.Event().wait()
            raise AssertionError

        began_s = asyncio.get_running_loop().time()
        async with PrefillLinks(connect, pair.links._hello, (pair.transport,), Timers()) as links:
            link = await links.get(peer.target)
            opening = asyncio.create_task(links.get(TARGET))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert asyncio.get_running_loop().time() == began_s
        assert link.is_lost
        await asyncio.wait([opening])
