"""The process that reads prompts. Its server also echoes bytes, for the bare round trip.

Prints where it serves; for each line that comes, the time at which each prompt's first token was
sent since the last one.
"""

import asyncio
import json
import sys
import time
from typing import Any

import grpc
import grpc.aio
import uvloop

from bench.handoff_cost.worker import TIMERS, parts_of
from kvtransfer.transports import worker_transports
from kvtransfer.transports.base import End
from pdserve.domain.messages import PrefillDone, PrefillToDecode, Role
from pdserve.observe.logging import process_log
from pdserve.rpc.links import prefill_service
from pdserve.rpc.server import RpcServer
from pdserve.rpc.streams import PrefillServerLink
from prefill_worker.building import open_prefill_worker
from prefill_worker.prefill_loop import PrefillLoop

MAX_MESSAGE_BYTES = 16 << 20


def note_first_tokens(loop: PrefillLoop) -> dict[str, float]:
    """When each was sent, by request."""
    sent_s: dict[str, float] = {}
    tell = loop.tell

    def noted(peer: PrefillServerLink, message: PrefillToDecode) -> None:
        if isinstance(message, PrefillDone):
            sent_s[message.handoff.request_id] = time.monotonic()
        tell(peer, message)

    loop.tell = noted  # type: ignore[method-assign]
    return sent_s


def add_echo(server: grpc.aio.Server) -> str:
    async def echo(request: bytes, context: Any) -> bytes:
        return request

    handler = grpc.unary_unary_rpc_method_handler(echo, bytes, bytes)
    services = grpc.method_handlers_generic_handler("bench.Echo", {"Echo": handler})
    server.add_generic_rpc_handlers((services,))
    return "bench.Echo"


async def main(step_s: float, num_prompts: int) -> None:
    parts = parts_of(Role.PREFILL, step_s=step_s, num_prompts=num_prompts)
    transports = worker_transports(parts.settings, End(parts.epoch))
    async with open_prefill_worker(parts, transports) as worker:
        sent_s = note_first_tokens(worker.loop)
        server = await RpcServer.start(
            "127.0.0.1",
            0,
            [prefill_service(worker.service.handle), add_echo],
            TIMERS,
            max_message_bytes=MAX_MESSAGE_BYTES,
        )
        print(json.dumps({"address": server.address}), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(sent_s), flush=True)
            sent_s.clear()
        await server.close(0.0)
    parts.engine.close()


if __name__ == "__main__":
    with process_log(level="warning", file=None):
        uvloop.run(main(float(sys.argv[1]), int(sys.argv[2])))
