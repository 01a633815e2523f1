"""Message streams: what the roles see of a connection, and the in-memory kind. No gRPC here."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Generic, Protocol, TypeVar

import structlog

from pdserve.domain import messages as m
from pdserve.domain.errors import Reason, WorkerLost

log = structlog.get_logger(__name__)

T = TypeVar("T")
Out = TypeVar("Out")
In = TypeVar("In")
OutContra = TypeVar("OutContra", contravariant=True)
InCo = TypeVar("InCo", covariant=True)

MAX_NUM_BUFFERED_MESSAGES = 1024


class MessageStream(Protocol[OutContra, InCo]):
    """An ordered, two-way stream of values. One task receives; any number may send.

    Cancelling a sender or the receiver leaves the stream intact.
    """

    peer: str  # for logs and messages

    @property
    def is_over(self) -> bool:
        """Nothing more can be sent, and nothing received but what has arrived."""
        ...

    def __hash__(self) -> int: ...

    async def send(self, message: OutContra) -> None:
        """Queue a message; waits while the peer is behind. Raises `WorkerLost` once it is over."""
        ...

    def try_send(self, message: OutContra) -> bool:
        """Queue a message at once; False when the peer is too far behind or gone.

        For what its sender tries again or takes elsewhere; all else goes by `send_or_abort`.
        """
        ...

    async def receive(self) -> InCo:
        """Return the next message; raises `WorkerLost` once the stream is over."""
        ...

    async def close(self) -> None:
        """End the stream in both directions, after what is queued; safe to call twice."""
        ...

    def abort(self) -> None:
        """End the stream at once, for a peer that cannot be served; whoever receives closes it."""
        ...


DecodeLink = MessageStream[m.RouterToDecode, m.DecodeToRouter]
DecodeServerLink = MessageStream[m.DecodeToRouter, m.RouterToDecode]
PrefillLink = MessageStream[m.DecodeToPrefill, m.PrefillToDecode]
PrefillServerLink = MessageStream[m.PrefillToDecode, m.DecodeToPrefill]
RegisterLink = MessageStream[m.WorkerReport, m.RegisterReply]
RegisterServerLink = MessageStream[m.RegisterReply, m.WorkerReport]


def send_or_abort(stream: MessageStream[Out, Any], message: Out) -> bool:
    """Queue a message whose loss would leave something held, or somebody waiting, at the peer.

    A peer that is too far behind to take it loses the stream: the end of a stream frees at both
    ends all that it carried. False then.
    """
    if stream.try_send(message):
        return True
    if not stream.is_over:
        log.warning("stream.aborted", peer=stream.peer, unsent=type(message).__name__)
        stream.abort()
    return False


async def receive_hello(stream: MessageStream[Any, T], within_s: float) -> T:
    """The first message of a peer; raises `WorkerLost` if it says nothing for so long."""
    try:
        async with asyncio.timeout(within_s):
            return await stream.receive()
    except TimeoutError:
        raise WorkerLost(f"{stream.peer} said nothing for {within_s:g} s") from None


async def iterate(stream: MessageStream[Any, T]) -> AsyncIterator[T]:
    """Yield messages until the stream is over."""
    while True:
        try:
            message = await stream.receive()
        except WorkerLost:
            return
        yield message


class Mailbox(Generic[T]):
    """A bounded queue that can end. What was put before the end can still be taken."""

    def __init__(self, max_num_items: int = MAX_NUM_BUFFERED_MESSAGES) -> None:
        self._items: deque[T] = deque()
        self._max_num_items = max_num_items
        self._is_over = False
        self._takers: deque[asyncio.Future[None]] = deque()
        self._putters: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def is_over(self) -> bool:
        return self._is_over

    def end(self) -> None:
        """No more items; wakes everyone who waits."""
        self._is_over = True
        _wake(self._takers, len(self._takers))
        _wake(self._putters, len(self._putters))

    def try_put(self, item: T) -> bool:
        """Add an item at once; False when the box is full or over."""
        if self._is_over or len(self._items) >= self._max_num_items:
            return False
        self._items.append(item)
        _wake(self._takers, 1)
        return True

    async def put(self, item: T) -> bool:
        """Add an item, waiting for room; False when the box is over."""
        while not self._is_over and len(self._items) >= self._max_num_items:
            await _wait_in(self._putters)
        return self.try_put(item)

    async def take(self) -> T | None:
        """The oldest item, waiting for one; None when the box is over and empty."""
        while not self._items:
            if self._is_over:
                return None
            await _wait_in(self._takers)
        item = self._items.popleft()
        _wake(self._putters, 1)
        return item


async def _wait_in(waiters: deque[asyncio.Future[None]]) -> None:
    waiter = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    try:
        await waiter
    except asyncio.CancelledError:
        if waiter in waiters:
            waiters.remove(waiter)
        else:  # woken and cancelled at once: the next in line gets the turn
            _wake(waiters, 1)
        raise


def _wake(waiters: deque[asyncio.Future[None]], count: int) -> None:
    while waiters and count > 0:
        waiter = waiters.popleft()
        if not waiter.done():
            waiter.set_result(None)
            count -= 1


class MailboxStream(Generic[Out, In]):
    """A `MessageStream` for whatever fills the one mailbox and empties the other."""

    def __init__(self, outgoing: Mailbox[Out], incoming: Mailbox[In], peer: str) -> None:
        self.peer = peer
        self._outgoing = outgoing
        self._incoming = incoming
        self._why_over = "closed the stream"
        self._reason_over: Reason | None = None

    @property
    def is_over(self) -> bool:
        return self._outgoing.is_over

    async def send(self, message: Out) -> None:
        if not await self._outgoing.put(message):
            raise self._lost()

    def try_send(self, message: Out) -> bool:
        return self._outgoing.try_put(message)

    async def receive(self) -> In:
        message = await self._incoming.take()
        if message is None:
            raise self._lost()
        return message

    def explain(self, why: str, reason: Reason | None = None) -> None:
        """Why the stream is about to be over: `why` goes on from the peer's name."""
        self._why_over = why
        self._reason_over = reason if reason is Reason.INCOMPATIBLE_PEER else None

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._outgoing.end()
        self._incoming.end()

    def _lost(self) -> WorkerLost:
        return WorkerLost(f"{self.peer} {self._why_over}", reason=self._reason_over)


class MemoryStream(MailboxStream[Out, In]):
    """One end of an in-memory pair: its mailboxes are those of the other end, changed over."""


def memory_stream_pair(
    left: str = "left", right: str = "right"
) -> tuple[MemoryStream[Any, Any], MemoryStream[Any, Any]]:
    """Two joined ends: what one sends the other receives."""
    rightward: Mailbox[Any] = Mailbox()
    leftward: Mailbox[Any] = Mailbox()
    return (
        MemoryStream(rightward, leftward, peer=right),
        MemoryStream(leftward, rightward, peer=left),
    )
