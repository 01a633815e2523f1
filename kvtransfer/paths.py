"""How one rank reads one rank of a peer: by the first of its transports that works.

A transport that fails is left alone for a while, for this pair, and the next one takes the read
over at once. Which one is used, and why, is told in the log and in what the worker reports.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from kvtransfer.transports.base import Transport
from kvtransfer.transports.divided import PartsRegion, ReadsParts
from pdserve.config.timers import Timers
from pdserve.domain.errors import ReadRefused, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_store import KvStore

log = structlog.get_logger(__name__)

OnFallback = Callable[[str], None]
"""Hears the name of a transport each time that it failed a read which another one took over."""


def ignore_fallback(transport: str) -> None:
    """For whoever need not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathRules:
    """Of all paths of a rank."""

    avoid_s: float  # a transport that failed is left alone for this long
    on_fallback: OnFallback = ignore_fallback


PLAIN_RULES = PathRules(avoid_s=Timers().transport_retry_s)
"""For tools and tests."""


class _Way:
    """One transport and the region that it reads."""

    def __init__(self, transport: Transport, region: RemoteRegion) -> None:
        self.transport = transport
        self.region = region
        self.failure = ""  # of the last read, if it failed
        self.avoid_until_s = 0.0

    @property
    def reads_parts(self) -> bool:
        return isinstance(self.transport, ReadsParts)


class Path:
    """Whoever opened it closes it; the transports stay their owner's."""

    def __init__(self, ways: Sequence[_Way], obstacles: Sequence[str], rules: PathRules) -> None:
        self._ways = ways
        self._obstacles = obstacles
        self._rules = rules
        self.num_fallbacks = 0

    @property
    def num_blocks(self) -> int:
        """Of the peer: each way reads blocks below this."""
        return min(way.region.num_blocks for way in self._ways)

    @property
    def transport_name(self) -> str:
        """What the next read is tried by first."""
        return self._in_order()[0].transport.name

    @property
    def reads_parts(self) -> bool:
        """Whether what the next read is tried by first takes parts of blocks, too."""
        return self._in_order()[0].reads_parts

    @property
    def why(self) -> str:
        """In words, for people."""
        way, now_s = self._in_order()[0], asyncio.get_running_loop().time()
        better = self._ways[: self._ways.index(way)]
        failed = [
            f"{each.transport.name} failed ({each.failure}) and is tried again in "
            f"{max(0.0, each.avoid_until_s - now_s):.0f} s"
            for each in better
        ]
        reasons = [*self._obstacles, *failed]
        others = [each.transport.name for each in self._ways if each is not way]
        if reasons:
            return "; ".join(reasons)
        if not others:
            return "the only one that both have"
        return f"the first that both have, before {', '.join(others)}"

    async def read(
        self, remote_blocks: Sequence[BlockId], memory: KvStore, local_blocks: Sequence[BlockId]
    ) -> None:
        """As `Transport.read`, by one after the other until one has done it."""
        await self._read(remote_blocks, memory, local_blocks, num_parts=1)

    async def read_parts(
        self,
        remote_parts: Sequence[BlockId],
        memory: KvStore,
        local_parts: Sequence[BlockId],
        num_parts: int,
    ) -> bool:
        """As `read`, of parts, `num_parts` of which are a block, into memory that counts them.

        False, and what is in the local parts is anything, if it comes to a transport that takes
        whole blocks only.
        """
        return await self._read(remote_parts, memory, local_parts, num_parts)

    async def _read(
        self,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
        num_parts: int,
    ) -> bool:
        ways = self._in_order()
        for way, next_one in zip(ways, [*ways[1:], None], strict=True):
            region = way.region
            if num_parts > 1:
                if not way.reads_parts:
                    return False
                region = PartsRegion.of(region, num_parts)
            try:
                await way.transport.register(memory)
                await way.transport.read(region, remote_blocks, memory, local_blocks)
            except ReadRefused:
                raise  # the peer's own word, whatever carries it
            except TransferFailed as error:
                self._avoid(way, error.message, next_one)
                if next_one is None:
                    raise
            else:
                way.failure = ""
                break
        return True

    def _in_order(self) -> list[_Way]:
        """Those that may be tried, the best first: all, if each of them is to be left alone."""
        now_s = asyncio.get_running_loop().time()
        fit = [way for way in self._ways if not way.failure or now_s >= way.avoid_until_s]
        return fit or list(self._ways)

    def _avoid(self, way: _Way, why: str, next_one: _Way | None) -> None:
        now_s = asyncio.get_running_loop().time()
        is_news = not way.failure or now_s >= way.avoid_until_s
        way.failure, way.avoid_until_s = why, now_s + self._rules.avoid_s
        if next_one is not None:
            self.num_fallbacks += 1
            self._rules.on_fallback(way.transport.name)
        if is_news:
            log.warning(
                "kv_transport.failed",
                transport=way.transport.name,
                why=why,
                instead=next_one and next_one.transport.name,
                avoid_s=self._rules.avoid_s,
            )

    async def close(self) -> None:
        """Forget the peer, by every way."""
        for way in self._ways:
            await way.transport.close_peer(way.region)


def open_path(
    transports: Sequence[Transport], regions: Sequence[RemoteRegion], rules: PathRules
) -> Path | None:
    """By those of our transports, the best first, that reach the peer; None if none does."""
    ways, obstacles = [], []
    for transport in transports:
        offered = [region for region in regions if region.transport == transport.name]
        reached = [region for region in offered if transport.can_reach(region)]
        if reached:
            ways.append(_Way(transport, reached[0]))
        elif not ways:
            what = "does not reach the peer" if offered else "is not offered by the peer"
            obstacles.append(f"{transport.name} {what}")
    return Path(ways, obstacles, rules) if ways else None
