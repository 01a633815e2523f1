"""Reading a peer's memory by NVIDIA's transfer library, nixl, over UCX.

UCX moves bytes by what both ends have: RDMA over a fabric, NVLink or CUDA IPC between GPUs, the
host's memory, and TCP where there is nothing else.

    peer's blocks ──── READ, one-sided ────▶ slots ──── copies ────▶ own blocks

Nothing stops such a read once it is under way. So it never lands in blocks, which may belong to
somebody else by the time when it does, but in slots, and a slot is used again once the library says
that its read is over. A cancelled read copies nothing any more.

The peer does nothing for a read, so it neither allows nor hears of it (`may_read` is not asked).
Whoever has the address of a region can read it, and the bytes are trusted only as far as their
digests.
"""

import asyncio
import base64
import binascii
import functools
import hashlib
import importlib.metadata
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog

from kvtransfer.transports.base import MayRead, OnRead, check_read, ignore
from kvtransfer.transports.nixl_agent import Agent, AgentThread, Outcome
from kvtransfer.transports.nixl_slots import Place, Slot, Slots, Span
from kvtransfer.transports.shm import host_identity
from pdserve.domain.errors import LocalFault, TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.messages import RemoteRegion
from pdserve.engine.kv_store import KvStore

log = structlog.get_logger(__name__)

NAME = "nixl"
DISTRIBUTION = "nixl-cu13"
MAX_METADATA_BYTES = 64 << 10
"""Of an agent: some hundreds for each device that it can be reached by."""
MAX_NUM_SLOTS_OF_READ = 8
"""So that the thread has the next ones while the event loop copies."""
MAX_NUM_BLOCKS_OF_FLIGHT = 1024
"""However small they are: each takes the library a while, and a flight has a deadline."""
MAX_NUM_CLOSED = 64
"""Peers that the agent still knows after `close_peer`. If it forgets one that lives and meets it
again, UCX keeps a connection for each time."""
_KINDS = ("DRAM", "VRAM")


def library_version() -> str:
    """Both ends must have the same: what agents say of themselves is theirs to change."""
    return importlib.metadata.version(DISTRIBUTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Address:
    """What a region says of itself."""

    agent: str
    metadata: bytes
    span: Span
    host: str

    @classmethod
    def of(cls, region: RemoteRegion) -> "_Address":
        """Raises `TransferFailed` for an address that is none."""
        given = region.address
        num_bytes = region.num_blocks * region.block_bytes
        try:
            metadata = _decoded(given["metadata"])
            version, agent, kind, host = (given[x] for x in ("version", "agent", "kind", "host"))
            start, device = int(given["start"]), int(given["device"])
            is_whole = given["sum"] == _sum(metadata)
        except (KeyError, ValueError) as error:
            raise TransferFailed("the peer's address cannot be read") from error
        if version != library_version():
            raise TransferFailed(f"the peer has nixl {version}, we have {library_version()}")
        makes_sense = is_whole and agent and kind in _KINDS and 0 <= device < 1 << 16
        if not makes_sense or not 0 < start < start + num_bytes < 1 << 64:
            raise TransferFailed("the peer's address makes no sense")
        return cls(
            agent=agent,
            metadata=metadata,
            span=Span(Place(kind, device), start, num_bytes),
            host=host,
        )


def _decoded(metadata: str) -> bytes:
    if len(metadata) > 4 * MAX_METADATA_BYTES // 3:
        raise ValueError(f"metadata of {len(metadata)} characters")
    try:
        return base64.b64decode(metadata, validate=True)
    except binascii.Error as error:
        raise ValueError("metadata that is not base64") from error


def _sum(metadata: bytes) -> str:
    """Against damage: the library that reads the bytes was not made for any but its own."""
    return hashlib.blake2b(metadata, digest_size=16).hexdigest()


class NixlRegionServer:
    """An agent of its own, which knows of this memory alone. The memory outlives it."""

    sees_reads = False

    def __init__(self, agent: AgentThread, region: RemoteRegion, registered: Any) -> None:
        self.region = region
        self._agent = agent
        self._registered = registered

    @classmethod
    async def open(cls, memory: KvStore, silence_s: float) -> "NixlRegionServer":
        """Raises `LocalFault` if the library cannot be had or does not take the memory."""
        span = Span.of(memory)
        thread = AgentThread(silence_s=silence_s, serves=True)

        def register(agent: Agent) -> tuple[Any, bytes]:
            return span.register(agent), agent.get_agent_metadata()

        try:
            registered, metadata = await thread.call(register)
            if len(metadata) > MAX_METADATA_BYTES:
                raise LocalFault(
                    f"transport nixl: what its agent says of itself has {len(metadata)} bytes, "
                    f"at most {MAX_METADATA_BYTES} can be sent"
                )
        except BaseException as error:
            await thread.close(lambda agent: None)
            if isinstance(error, thread.errors):
                raise LocalFault(f"transport nixl: KV cannot be registered: {error}") from error
            raise
        region = RemoteRegion(
            transport=NAME,
            address={
                "version": library_version(),
                "host": host_identity(),
                "agent": thread.name,
                "metadata": base64.b64encode(metadata).decode(),
                "sum": _sum(metadata),
                "kind": span.place.kind,
                "device": str(span.place.device),
                "start": str(span.address),
            },
            num_blocks=memory.num_blocks,
            block_bytes=memory.layout.block_bytes,
        )
        return cls(thread, region, registered)

    async def close(self) -> None:
        """Nobody reads the memory any more; safe to call twice."""

        def forget(agent: Agent) -> None:
            agent.deregister_memory(self._registered)
            self._registered = None

        await self._agent.close(forget)


class _Peer:
    """A region that the agent knows of, from its first read until it leaves and its last flight."""

    def __init__(self, key: tuple[object, ...], address: _Address, block_bytes: int) -> None:
        self.key = key
        self.address = address
        self.block_bytes = block_bytes
        self.blocks: Any = None  # prepared, by the agent's thread
        self.num_closed = 0  # how often: reads end that began before
        self.is_leaving = False
        self.gone = asyncio.Event()
        self.flights: set[_Flight] = set()
        self.opening = asyncio.Lock()
        self._is_known = False

    @property
    def is_silent(self) -> bool:
        return any(flight.is_out for flight in self.flights)

    def open(self, agent: Agent) -> None:
        """On the agent's thread."""
        name = agent.add_remote_agent(self.address.metadata)
        self._is_known = True
        said = name.decode() if isinstance(name, bytes) else name
        if said != self.address.agent:
            raise TransferFailed("the peer's address names another agent than it describes")
        self.blocks = self.address.span.prepare(agent, said, self.block_bytes)

    def forget(self, agent: Agent, *, is_last: bool) -> None:
        """On the agent's thread, when no flight is under way."""
        if self.blocks is not None:
            self.blocks.release()
            self.blocks = None
        if is_last and self._is_known:
            agent.remove_remote_agent(self.address.agent)


class _Flight:
    """One READ into one slot, for the agent's thread and for whoever asked for it.

    The slot goes back once the read is over and `let_go` was called.
    """

    def __init__(
        self,
        peer: _Peer,
        slot: Slot,
        slots: Slots,
        blocks: Sequence[BlockId],
        on_over: Callable[[_Peer], None],
    ) -> None:
        self.is_given_up = False
        self.is_out = False  # its slot is written off
        self.slot = slot
        self.landed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._peer = peer
        self._slots = slots
        self._blocks = np.array(blocks, dtype=np.int32)
        self._on_over = on_over
        self._is_held = True
        self._is_over = False
        peer.flights.add(self)

    def prepare(self, agent: Agent) -> Any:
        peer = self._peer
        peer.address.span.enter()
        ours = self.slot.prepared(agent, peer.block_bytes)
        places = np.arange(len(self._blocks), dtype=np.int32)
        return agent.make_prepped_xfer("READ", ours, places, peer.blocks, self._blocks, b"")

    def tell(self, outcome: Outcome, why: str) -> None:
        if outcome is not Outcome.LANDED and not self.is_given_up:
            log.debug("nixl.read_failed", outcome=outcome.value, why=why)
        if outcome in (Outcome.SILENT, Outcome.BROKEN) and not self.is_out:
            self.is_out = True
            self._slots.write_off()
        if outcome is Outcome.SILENT:
            self.fail(f"the peer was {why}")
            return
        self._peer.flights.discard(self)
        if outcome is Outcome.LANDED:
            if not self.landed.done():
                self.landed.set_result(None)
        else:
            self._peer.is_leaving |= not self.is_given_up
            self.fail("the peer is gone, or its memory is")
        self._is_over = outcome is not Outcome.BROKEN  # else the slot stays out until the end
        self._return_slot()
        self._on_over(self._peer)

    def fail(self, why: str) -> None:
        if not self.landed.done():
            self.landed.set_exception(TransferFailed(why))

    def let_go(self) -> None:
        """The blocks have been copied, or nobody wants them any more."""
        self.is_given_up = True
        self._is_held = False
        if not self.landed.cancel() and not self.landed.cancelled():
            self.landed.exception()  # seen, whoever else has not
        self._return_slot()

    def _return_slot(self) -> None:
        if not self._is_over or self._is_held:
            return
        if self.is_out:
            self._slots.give_late(self.slot)
        else:
            self._slots.give(self.slot)


class NixlTransport:
    """An agent of its own for all that is read, and one more for each memory that is served.

    A read fails when a part of it is under way for `idle_timeout_s`, or after `total_timeout_s` in
    all, both without the wait for a slot. While such a part is still under way, nothing else is
    read from that peer.
    """

    name = NAME

    def __init__(self, *, idle_timeout_s: float, total_timeout_s: float) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._total_timeout_s = total_timeout_s
        self._slots = Slots(self._discard)
        self._peers: dict[tuple[object, ...], _Peer] = {}
        self._closed: dict[tuple[object, ...], _Peer] = {}  # of these, the last one closed is last
        self._thread: AgentThread | None = None
        self._is_closed = False

    @property
    def num_slots_out(self) -> int:
        """Not lent, since reads that were given up may still write into them."""
        return self._slots.num_out

    def _agent(self) -> AgentThread:
        if self._is_closed:
            raise TransferFailed("closed by this side")
        if self._thread is None:
            self._thread = AgentThread(silence_s=self._idle_timeout_s)
        return self._thread

    async def register(self, memory: KvStore) -> None:
        """Have an agent, which takes a while. Nothing is ever read into `memory` itself.

        Raises `LocalFault` if the library cannot be had.
        """
        Place.of(memory)
        await self._agent().call(lambda agent: None)

    async def serve(
        self, memory: KvStore, may_read: MayRead, on_read: OnRead = ignore
    ) -> NixlRegionServer:
        return await NixlRegionServer.open(memory, self._idle_timeout_s)

    def can_reach(self, region: RemoteRegion) -> bool:
        """Whether it is an address of this library; whether it can be read shows when it is."""
        if region.transport != self.name:
            return False
        try:
            _Address.of(region)
        except TransferFailed as failure:
            log.debug("nixl.unreachable", why=failure.message)
            return False
        return True

    async def read(
        self,
        region: RemoteRegion,
        remote_blocks: Sequence[BlockId],
        memory: KvStore,
        local_blocks: Sequence[BlockId],
    ) -> None:
        check_read(region, remote_blocks, memory, local_blocks)
        if not remote_blocks:
            return
        peer = await self._peer(region)
        place, size, num_closed = Place.of(memory), region.block_bytes, peer.num_closed
        slot: Slot | None = await self._slots.lend(place, size)
        flights: deque[tuple[_Flight, Sequence[BlockId]]] = deque()
        first = 0
        try:
            async with asyncio.timeout(self._total_timeout_s):
                while flights or first < len(remote_blocks):
                    if slot is not None:
                        if num_closed != peer.num_closed:
                            raise TransferFailed("closed by this side")
                        count = min(slot.num_bytes // size, MAX_NUM_BLOCKS_OF_FLIGHT)
                        part = slice(first, first + count)
                        flight = self._post(peer, slot, remote_blocks[part])
                        flights.append((flight, local_blocks[part]))
                        first, slot = part.stop, None
                    if first < len(remote_blocks) and len(flights) < MAX_NUM_SLOTS_OF_READ:
                        slot = await self._slots.lend_if_free(place, size)
                    if slot is None:
                        flight, ours = flights[0]
                        await flight.landed
                        await flight.slot.copy_to(memory, ours)
                        flight.let_go()
                        flights.popleft()
        except TimeoutError:
            limit_s = self._total_timeout_s
            raise TransferFailed(f"the peer took longer than {limit_s:g} s") from None
        finally:
            if slot is not None:
                self._slots.give(slot)
            for flight, _ in flights:
                flight.let_go()

    def _post(self, peer: _Peer, slot: Slot, blocks: Sequence[BlockId]) -> _Flight:
        flight = _Flight(peer, slot, self._slots, blocks, self._leave_if_over)
        if self._is_closed or peer.is_leaving:
            flight.tell(Outcome.FAILED, "closed by this side")
        else:
            self._agent().post(flight)
        return flight

    async def _peer(self, region: RemoteRegion) -> _Peer:
        """The agent knows it then. Raises `TransferFailed` if it is gone or silent."""
        key, thread = _key(region), self._agent()
        while (peer := self._peers.get(key)) and peer.is_leaving:
            try:
                async with asyncio.timeout(self._idle_timeout_s):
                    await peer.gone.wait()
            except TimeoutError:
                raise TransferFailed("an earlier read from the peer is still under way") from None
        if peer is None:
            peer = self._peers[key] = _Peer(key, _Address.of(region), region.block_bytes)
        async with peer.opening:
            if peer.blocks is None and not peer.is_leaving:
                try:
                    await thread.call(peer.open)
                except TransferFailed:
                    self._leave(peer)
                    raise
                except thread.errors as error:
                    self._leave(peer)
                    raise TransferFailed("the peer is gone, or its address is wrong") from error
                is_near = peer.address.host == host_identity()
                log.info("nixl.peer_opened", agent=peer.address.agent, on_this_host=is_near)
        if peer.is_leaving:
            raise TransferFailed("the peer is gone, or was closed by this side")
        self._closed.pop(key, None)
        if peer.is_silent:
            raise TransferFailed("the peer is silent: an earlier read from it is still under way")
        return peer

    async def close_peer(self, region: RemoteRegion) -> None:
        """Its reads fail at once. It is forgotten when it has failed, or after many others."""
        key = _key(region)
        if (peer := self._peers.get(key)) is None:
            return
        peer.num_closed += 1
        for flight in peer.flights:
            flight.fail("closed by this side")
        self._closed.pop(key, None)
        self._closed[key] = peer
        if len(self._closed) > MAX_NUM_CLOSED:
            self._leave(self._closed.pop(next(iter(self._closed))))

    def _leave(self, peer: _Peer) -> None:
        peer.is_leaving = True
        self._leave_if_over(peer)

    def _leave_if_over(self, peer: _Peer) -> None:
        if not peer.is_leaving or peer.flights or self._is_closed:
            return
        if self._peers.pop(peer.key, None) is None:
            return
        self._closed.pop(peer.key, None)
        name = peer.address.agent
        is_last = all(other.address.agent != name for other in self._peers.values())
        self._agent().soon(lambda agent: peer.forget(agent, is_last=is_last), peer.gone.set)

    def _discard(self, slot: Slot) -> None:
        if not self._is_closed:
            self._agent().soon(slot.forget, slot.free)

    async def close(self) -> None:
        """Ends the reads that run and the agent; servers are closed by whoever asked for them."""
        self._is_closed = True
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            peer.is_leaving = True
            for flight in peer.flights:
                flight.fail("closed by this side")
            peer.gone.set()

        def forget(agent: Agent) -> None:
            steps = [slot.forget for slot in self._slots.all]
            names = [peer.address.agent for peer in peers]
            for place, peer in enumerate(peers):
                is_last = peer.address.agent not in names[place + 1 :]
                steps.append(functools.partial(peer.forget, is_last=is_last))
            for step in steps:
                try:
                    step(agent)
                except errors as error:  # what is left goes with the agent
                    log.warning("nixl.not_forgotten", error=str(error))

        if self._thread is not None:
            errors = self._thread.errors
            await self._thread.close(forget)


def _key(region: RemoteRegion) -> tuple[object, ...]:
    return (*sorted(region.address.items()), region.num_blocks, region.block_bytes)
