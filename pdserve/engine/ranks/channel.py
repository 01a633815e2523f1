"""What two ranks say to each other besides tensors: questions by name, in both directions."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

import structlog

from pdserve.domain.errors import (
    LocalFault,
    PdserveError,
    RankLost,
    ReadRefused,
    TransferFailed,
    WorkerLost,
)
from pdserve.engine.ranks.frames import BadFrame, Message, frame, read_frame
from pdserve.engine.ranks.silence import TICK_S, Silence, Standstill

log = structlog.get_logger(__name__)

BEAT_S = 0.25
SILENT_S = 2.0
"""A peer on another host that has said nothing for so long is lost."""
STOPPED_S = 1.0
"""A peer on this host that is stopped is lost after this time ..."""
BUSY_SILENT_S = 10.0
"""... and one that is not may be silent for long: the machine may be too busy to let it speak."""
LOADING_SILENT_S = 60.0
"""While models load, on any host: imports and compilers hold up a process for seconds."""

GIVE_UP_S = 5.0
"""A handler that was cancelled is over within this time."""

Handler = Callable[[Message], Awaitable[Message | None]]
"""Answers a question. What it raises is raised where the question was asked: an error of ours as
what it is, any other as a `LocalFault` with the name of its kind."""

CLOSED = "closed its connection"

OnLost = Callable[[str], None]
"""Called once, on the event loop, with a clause: `has been silent for 2.0 s`."""

_KINDS: Mapping[str, type[PdserveError]] = {
    kind.__name__: kind for kind in (LocalFault, RankLost, ReadRefused, TransferFailed, WorkerLost)
}


class RankChannel:
    """One socket to the peer called `peer`, such as `rank 2`; whoever opens it closes it.

    Both ends beat, so that a peer which stopped is noticed: then, or once the connection ends,
    `on_lost` is called and every open question raises `RankLost`. `pid` is of a peer on this host.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer: str,
        pid: int | None = None,
    ) -> None:
        self.peer = peer
        self._standstill = None if pid is None else Standstill(pid)
        self.on_lost: OnLost = lambda why: None
        self.max_silence_s = LOADING_SILENT_S
        self.over = asyncio.Event()  # nothing more will be said or heard
        self._reader, self._writer = reader, writer
        self._handlers: dict[str, Handler] = {}
        self._numbers = itertools.count()
        self._questions: dict[int, asyncio.Future[Message]] = {}
        self._answering: dict[int, asyncio.Task[None]] = {}
        self._silence = Silence(asyncio.get_running_loop().time())
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]

    @classmethod
    async def open(cls, connection: socket.socket, peer: str, pid: int | None = None) -> Self:
        """Take over a connected stream socket."""
        connection.setblocking(False)
        if connection.family == socket.AF_UNIX:
            reader, writer = await asyncio.open_unix_connection(sock=connection)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader, writer = await asyncio.open_connection(sock=connection)
        return cls(reader, writer, peer, pid)

    def handle(self, name: str, handler: Handler) -> None:
        """Have `handler` answer questions called `name`; they begin in the order they came."""
        if name in self._handlers:
            raise ValueError(f"{name} has a handler already")
        self._handlers[name] = handler

    def begin(self, name: str, message: Message | None = None) -> asyncio.Future[Message]:
        """Ask at once; the answer comes later. For those who wait for it with a deadline."""
        return self._begin(next(self._numbers), name, message or Message())

    def expect_quick(self) -> None:
        """Nothing loads any more that could hold up the peer."""
        self.max_silence_s = SILENT_S if self._standstill is None else BUSY_SILENT_S

    async def ask(self, name: str, message: Message | None = None, *, deadline_s: float) -> Message:
        """The answer; raises what the peer's handler raised, and `RankLost` for no answer.

        When cancelled or too late it has the peer cancel its handler, and raises once that is over
        or the peer is lost.
        """
        number = next(self._numbers)
        future = self._begin(number, name, message or Message())
        try:
            await asyncio.wait([future], timeout=deadline_s)
        except asyncio.CancelledError:
            await self._give_up(number, future)
            raise
        if future.done():
            return future.result()
        await self._give_up(number, future)
        raise RankLost(f"{self.peer} did not answer {name} within {deadline_s:g} s")

    def tell(self, name: str, message: Message | None = None) -> None:
        """Say something that needs no answer; nothing happens if the peer is lost."""
        message = message or Message()
        self._send({"tell": name, "fields": message.fields}, message.body)

    async def close(self) -> None:
        """End the connection after what was said, and with it what is still being answered."""
        self._end("was closed")
        for task in (*self._tasks, *self._answering.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._answering.values(), return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _begin(self, number: int, name: str, message: Message) -> asyncio.Future[Message]:
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._questions[number] = future
        future.add_done_callback(lambda done: self._forget(number, done))
        if self.over.is_set():
            future.set_exception(RankLost(f"{self.peer} is lost"))
        else:
            self._send({"ask": number, "name": name, "fields": message.fields}, message.body)
        return future

    def _forget(self, number: int, done: asyncio.Future[Message]) -> None:
        self._questions.pop(number, None)
        if not done.cancelled():
            done.exception()  # nobody may look any more, once another rank is lost

    async def _give_up(self, number: int, future: asyncio.Future[Message]) -> None:
        """Until the peer has stopped answering; if it does not, it will be lost for its silence."""
        self._send({"cancel": number})
        loop = asyncio.get_running_loop()
        until_s = loop.time() + GIVE_UP_S
        while not future.done() and loop.time() < until_s:
            with contextlib.suppress(asyncio.CancelledError):  # raised by whoever gives up
                await asyncio.wait([future], timeout=until_s - loop.time())

    def _send(self, head: Mapping[str, Any], body: bytes | memoryview = b"") -> None:
        if not self.over.is_set() and not self._writer.is_closing():
            self._writer.write(frame(head, body))

    async def _read(self) -> None:
        try:
            while True:
                head, body = await read_frame(self._reader)
                self._silence.heard()
                self._take(head, body)
        except (asyncio.IncompleteReadError, OSError):
            self._lose(CLOSED)
        except BadFrame as error:
            self._lose(f"sent {error}")

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        beat_s = loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            now_s = loop.time()
            silent_s = self._silence.tick(now_s)
            if silent_s >= self.max_silence_s:
                self._lose(f"has been silent for {silent_s:.1f} s")
                return
            stopped_s = self._standstill.look(now_s) if self._standstill is not None else 0.0
            if stopped_s >= STOPPED_S:
                self._lose(f"has been stopped for {stopped_s:.1f} s")
                return
            if now_s - beat_s >= BEAT_S:
                beat_s = now_s
                self._send({})

    def _take(self, head: dict[str, Any], body: bytes) -> None:
        """One message; a beat says nothing."""
        match head:
            case {"ask": int(number), "name": str(name), "fields": dict(fields)}:
                self._answer(number, name, Message(fields, body))
            case {"tell": str(name), "fields": dict(fields)}:
                self._answer(-1 - next(self._numbers), name, Message(fields, body))
            case {"answer": int(number), "fields": dict(fields)}:
                if (future := self._questions.get(number)) and not future.done():
                    future.set_result(Message(fields, body))
            case {"failed": int(number), "kind": str(kind), "message": str(text)}:
                if (future := self._questions.get(number)) and not future.done():
                    future.set_exception(_KINDS.get(kind, LocalFault)(text))
            case {"cancel": int(number)}:
                if number in self._answering:
                    self._answering[number].cancel()
            case _ if head:
                raise BadFrame("a message that nobody knows")

    def _answer(self, number: int, name: str, message: Message) -> None:
        """Start to answer; negative numbers are not questions."""
        task = asyncio.create_task(self._run_handler(number, name, message))
        self._answering[number] = task
        task.add_done_callback(lambda done: self._answered(number, name, done))

    def _answered(self, number: int, name: str, done: asyncio.Task[None]) -> None:
        """Also if it was given up before it began, so that nothing of it has run."""
        self._answering.pop(number, None)
        if done.cancelled() and number >= 0:
            text = f"{name} was given up"
            self._send({"failed": number, "kind": "RankLost", "message": text})

    async def _run_handler(self, number: int, name: str, message: Message) -> None:
        try:
            handler = self._handlers.get(name)
            if handler is None:
                raise LocalFault(f"nobody here answers {name}")
            answer = await handler(message) or Message()
        except PdserveError as error:
            self._say_failed(number, name, type(error).__name__, error.message)
        except Exception as error:
            log.error("question.failed", name=name, peer=self.peer, exc_info=error)
            self._say_failed(number, name, "LocalFault", f"{name} failed: {type(error).__name__}")
        else:
            if number >= 0:
                self._send({"answer": number, "fields": answer.fields}, answer.body)

    def _say_failed(self, number: int, name: str, kind: str, text: str) -> None:
        if number >= 0:
            self._send({"failed": number, "kind": kind, "message": text})
        else:
            log.error("message.failed", name=name, peer=self.peer, why=text)

    def _lose(self, why: str) -> None:
        if not self.over.is_set():
            self._end(why)
            self.on_lost(why)

    def _end(self, why: str) -> None:
        if self.over.is_set():
            return
        self.over.set()
        for future in list(self._questions.values()):
            if not future.done():
                future.set_exception(RankLost(f"{self.peer} {why}"))
