"""Streams between the roles of one process: what gRPC is between processes. No gRPC here."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from pdserve.config.timers import Timers
from pdserve.domain.errors import PeerFault, WorkerLost
from pdserve.rpc.streams import MemoryStream, iterate, memory_stream_pair

Stream = MemoryStream[Any, Any]
Handler = Callable[[Stream], Awaitable[None]]


class Wire:
    """A stream between two ends that takes `delay_s()` a message, can stall and can be cut.

    Like a connection it loses nothing in the middle: whatever comes, comes in order.
    """

    def __init__(self, left: str, right: str, delay_s: Callable[[], float]) -> None:
        self.left, left_inner = memory_stream_pair(left, right)
        self.right, right_inner = memory_stream_pair(right, left)
        self.flows = asyncio.Event()
        self.flows.set()
        self._delay_s = delay_s
        self._inner = (left_inner, right_inner)

    async def run(self) -> None:
        left, right = self._inner
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.carry(left, right))
            tasks.create_task(self.carry(right, left))

    def cut(self) -> None:
        for end in (self.left, self.right, *self._inner):
            end.abort()

    async def carry(self, source: Stream, target: Stream) -> None:
        async for message in iterate(source):
            await self.flows.wait()
            await asyncio.sleep(self._delay_s())
            if not target.try_send(message):  # who reads nothing for so long loses the stream
                break
        self.cut()


class MemoryNetwork:
    """Addresses at which roles listen; an async context that owns every stream between them."""

    def __init__(self, delay_s: Callable[[], float] = lambda: 0.0) -> None:
        self.make_wire: Callable[[str, str], Wire] = lambda left, right: Wire(left, right, delay_s)
        self.wires: defaultdict[str, list[Wire]] = defaultdict(list)
        self._delay_s = delay_s
        self._handlers: dict[str, Handler] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "MemoryNetwork":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def listen(self, address: str, handle: Handler) -> None:
        """`handle` runs once for each stream that is opened to `address`, until it ends."""
        self._handlers[address] = handle

    def leave(self, address: str) -> None:
        """As when a process is killed: nobody listens, and every stream is lost."""
        self._handlers.pop(address, None)
        self.cut(address)

    def cut(self, address: str) -> None:
        """Lose every stream to `address`; others can be opened."""
        for wire in self.wires.pop(address, ()):
            wire.cut()

    async def connect(self, address: str, timers: Timers | None = None) -> Stream:
        """Open a stream; raises `WorkerLost` if nobody listens there."""
        await asyncio.sleep(self._delay_s())
        handle = self._handlers.get(address)
        if handle is None:
            raise WorkerLost(f"nobody listens at {address}")
        wire = self.make_wire("caller", address)
        self.wires[address].append(wire)
        self._spawn(self._run(wire, address))
        self._spawn(serve_like_grpc(handle, wire.right, wire.left))
        return wire.left

    async def _run(self, wire: Wire, address: str) -> None:
        try:
            await wire.run()
        finally:
            if wire in self.wires[address]:  # not after a cut
                self.wires[address].remove(wire)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def serve_like_grpc(handle: Handler, stream: Stream, caller: Stream) -> None:
    """A handler and its stream end together, and the caller's end says why."""
    try:
        await handle(stream)
    except PeerFault as fault:
        caller.explain(f"ended the stream: {fault.message}", fault.reason)
    finally:
        await stream.close()
