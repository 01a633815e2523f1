"""Text to tokens without holding up the event loop or anyone else's prompt.

    short   at once, on the event loop: a millisecond
    long    in one of several processes, in the order of arrival
    huge    the same, in processes of their own that give way to all others

So no text waits behind a longer kind, and the operating system shares the processor between them.
Who stops waiting (a cancel, a deadline) ends the process that was at work on the text.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from pdserve.domain.errors import BadRequest, FieldViolation, LocalFault, Refused
from pdserve.engine.tokenizer import Tokenizer
from router.tokenizer_process import MAX_NICE, REPLY, REQUEST, TOKEN_BYTES

log = structlog.get_logger(__name__)

MAX_SHORT_CHARS = 1024
"""Texts up to this take 0.3 ms, and 5 ms at the worst (rare characters in one word)."""
MAX_LONG_CHARS = 131_072
STREAM_BUFFER_BYTES = 1 << 20
MAX_NUM_TRIES = 2  # a process that is killed is replaced once for each text
END_S = 2.0  # for the tokenizer process to see that it is not needed any more
_FIRST_GUESS_S = 2e-6  # for a character
_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSettings:
    """`max_num_queued` counts texts beyond those being encoded; None: all that are in flight."""

    max_chars: int | None
    num_processes: int
    niceness: int
    max_num_queued: int | None = None
    keeps_processes: bool = True


LANES = (
    LaneSettings(max_chars=MAX_LONG_CHARS, num_processes=4, niceness=0),
    # An encoded text of 2 MB holds 400 MB, until its process ends.
    LaneSettings(
        max_chars=None,
        num_processes=2,
        niceness=MAX_NICE,
        max_num_queued=16,
        keeps_processes=False,
    ),
)


class TextEncoder:
    """Encodes texts; an async context that owns every process it starts."""

    def __init__(
        self, tokenizer: Tokenizer, model_dir: Path, lanes: Sequence[LaneSettings] = LANES
    ) -> None:
        self._tokenizer = tokenizer
        self._server = _TokenizerProcess(model_dir)
        self._lanes = [_Lane(settings, self._server) for settings in lanes]

    async def __aenter__(self) -> "TextEncoder":
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for lane in self._lanes:
            lane.close()
        await self._server.close()

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """Tokens of `text`.

        Raises `Refused` when too many texts of its length wait, and `BadRequest` for a text that
        the tokenizer cannot encode.
        """
        if len(text) <= MAX_SHORT_CHARS:
            try:
                return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            except Exception as error:  # the library raises bare Exception
                raise _cannot_be_encoded() from error
        for lane in self._lanes:
            if lane.settings.max_chars is None or len(text) <= lane.settings.max_chars:
                return await lane.encode(text, add_special_tokens=add_special_tokens)
        raise AssertionError("the last lane takes texts of any length")


class _Lane:
    """Texts of one kind: `num_processes` at a time, first come, first served."""

    def __init__(self, settings: LaneSettings, server: "_TokenizerProcess") -> None:
        self.settings = settings
        self._server = server
        self._places = asyncio.Semaphore(settings.num_processes)
        self._idle: list[_Child] = []
        self._num_waiting = 0
        self._num_waiting_chars = 0
        self._char_s = _FIRST_GUESS_S

    async def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        await self._enter(len(text))
        try:
            return await self._encode(text, add_special_tokens)
        finally:
            self._places.release()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _enter(self, num_chars: int) -> None:
        """Wait for a place."""
        limit = self.settings.max_num_queued
        if self._places.locked() and limit is not None and self._num_waiting >= limit:
            raise Refused(
                f"{self._num_waiting} prompts as long as this one wait to be tokenised; "
                f"the limit is {limit}",
                retry_after_s=self._num_waiting_chars
                * self._char_s
                / (self.settings.num_processes),
            )
        self._num_waiting += 1
        self._num_waiting_chars += num_chars
        try:
            await self._places.acquire()
        finally:
            self._num_waiting -= 1
            self._num_waiting_chars -= num_chars

    async def _encode(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        for _ in range(MAX_NUM_TRIES):
            child = self._idle.pop() if self._idle else await self._server.fork(self.settings)
            is_good = False
            started_s = asyncio.get_running_loop().time()
            try:
                token_ids = await child.encode(text, add_special_tokens)
                is_good = self.settings.keeps_processes
            except (EOFError, OSError):
                log.warning("tokenizer.lost", num_chars=len(text))
                continue
            finally:
                if is_good:
                    self._idle.append(child)
                else:
                    child.close()
            char_s = (asyncio.get_running_loop().time() - started_s) / len(text)
            self._char_s += _SMOOTHING * (char_s - self._char_s)
            return token_ids
        raise LocalFault("the tokenizer's process was lost")


@dataclass(frozen=True, slots=True)
class _Child:
    """The socket of a forked process; closing it ends the process."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def encode(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        """Raises `EOFError` or `OSError` if the process is gone."""
        content = text.encode()
        self.writer.write(REQUEST.pack(add_special_tokens, len(content)))
        self.writer.write(content)
        await self.writer.drain()
        is_encoded, num_tokens = REPLY.unpack(await self.reader.readexactly(REPLY.size))
        if not is_encoded:
            raise _cannot_be_encoded()
        token_ids = await self.reader.readexactly(num_tokens * TOKEN_BYTES)
        return memoryview(token_ids).cast("I")

    def close(self) -> None:
        self.writer.transport.abort()


@dataclass(slots=True)
class _TokenizerProcess:
    """Owns the process that children are forked from; starts another when it is gone."""

    model_dir: Path
    _control: socket.socket | None = None
    _process: asyncio.subprocess.Process | None = None
    _starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            self._control = ours
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "router.tokenizer_process",
                str(theirs.fileno()),
                str(self.model_dir.absolute()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                # No threads of the library's own: they would be lost in a fork.
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )

    async def close(self) -> None:
        """End the process, and wait until it has ended."""
        if self._control is not None:
            self._control.close()
        if (process := self._process) is None:
            return
        try:
            async with asyncio.timeout(END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def fork(self, settings: LaneSettings) -> _Child:
        """A new child; it may still be about to start."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                async with self._starting:
                    await self._send(theirs, settings.niceness)
                reader, writer = await asyncio.open_unix_connection(
                    sock=ours, limit=STREAM_BUFFER_BYTES
                )
            except BaseException:
                ours.close()
                raise
        return _Child(reader, writer)

    async def _send(self, theirs: socket.socket, niceness: int) -> None:
        assert self._control is not None
        try:
            socket.send_fds(self._control, [bytes([niceness])], [theirs.fileno()])
        except OSError as error:
            log.error("tokenizer.restarted", why=error.strerror)
            await self.close()
            await self.start()
            socket.send_fds(self._control, [bytes([niceness])], [theirs.fileno()])


def _cannot_be_encoded() -> BadRequest:
    violation = FieldViolation("text", "holds what the model's tokenizer cannot encode")
    return BadRequest.of([violation])
