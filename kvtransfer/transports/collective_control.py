"""The connection beside a group of two: small frames both ways, and the peer's death at once."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import cast

from kvtransfer.transports.collective_frames import (
    HEADER_BYTES,
    Frame,
    Kind,
    decode_header,
    encode,
)
from kvtransfer.transports.requests import BadFrame

_MAX_NUM_UNREAD = 128
"""More frames than a correct peer has under way."""


class Control(asyncio.Protocol):
    """One end. `lost` is done once the connection is, whoever ended it.

    A peer that says what no correct one does loses the connection.
    """

    def __init__(self, on_made: Callable[["Control"], None] = lambda control: None) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.host = ""  # of this end, as the peer reaches it
        self._on_made = on_made
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._frames: deque[Frame] = deque()
        self._has_news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # of a stream, on any loop
        self.host = transport.get_extra_info("sockname")[0]
        self._on_made(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            while len(self._received) >= HEADER_BYTES:
                kind, num_bytes = decode_header(memoryview(self._received)[:HEADER_BYTES])
                end = HEADER_BYTES + num_bytes
                if len(self._received) < end:
                    return
                self._frames.append(Frame(kind, bytes(self._received[HEADER_BYTES:end])))
                del self._received[:end]
                self._has_news.set()
            if len(self._frames) > _MAX_NUM_UNREAD:
                raise BadFrame("more than can be under way")
        except BadFrame:
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._has_news.set()
        if not self.lost.done():
            self.lost.set_result(None)

    def send(self, frame: bytes) -> None:
        """Without waiting: frames are small and few. Nothing happens if the connection is lost."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def poll(self, kind: Kind) -> bool:
        """Whether the next frame is there and is of that kind; then it is taken."""
        if self._frames and self._frames[0].kind is kind:
            self._frames.popleft()
            return True
        return False

    async def frame(self, wait_s: float) -> Frame:
        """The next one; raises `TimeoutError`, or `ConnectionResetError` if there will be none."""
        async with asyncio.timeout(wait_s):
            while not self._frames:
                if self.lost.done():
                    raise ConnectionResetError("closed by the peer")
                self._has_news.clear()
                await self._has_news.wait()
        return self._frames.popleft()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Hang up; the descriptor is free afterwards."""
        if self._transport is not None:
            self._transport.abort()
            await self.lost


STOP = encode(Kind.STOP)
MADE = encode(Kind.MADE)
