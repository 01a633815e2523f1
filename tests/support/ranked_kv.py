"""Workers of several ranks in one process: real channels and transports, KV without a model."""

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pdserve.config.processes import WorkerSettings
from pdserve.domain.engine_spec import EngineSpec
from pdserve.domain.ids import PROTOCOL_VERSION, BlockId, Epoch, WorkerId
from pdserve.domain.layout import BlockOrder, KvLayout, LayerKv, RankLayout, ShardedLayout
from pdserve.domain.messages import HandoffHello, RemoteRegion, Role
from pdserve.domain.rank_place import RankPlace
from pdserve.engine.contract import Engine, StepBatch, StepResult
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.kv_store import KvStore
from pdserve.engine.ranks.channel import RankChannel
from pdserve.engine.ranks.ranked_kv import RankedKv
from pdserve.engine.ranks.service import OpenRankService, RankParts

WHOLE = KvLayout(
    layers=(LayerKv(4, 8, 8), LayerKv(4, 8, 8), LayerKv(2, 6, 4), LayerKv(4, 8, 8)),
    block_size=4,
    dtype="float32",
    item_bytes=4,
)
EPOCH = Epoch(7)
NUM_BLOCKS = 16


Planes = list[npt.NDArray[np.uint8]]
"""K and V of a prompt, layer after layer: each [tokens, kv_heads, bytes of a head]."""


def prompt_kv(whole: KvLayout, num_tokens: int, rng: np.random.Generator) -> Planes:
    """Of random bytes."""
    return [
        rng.integers(
            0, 256, (num_tokens, kv.num_kv_heads, head_dim * whole.item_bytes), dtype=np.uint8
        )
        for kv in whole.layers
        for head_dim in (kv.k_head_dim, kv.v_head_dim)
    ]


def block_of(planes: Planes, held: RankLayout, index: int) -> npt.NDArray[np.uint8]:
    """What a rank holds of block `index` of a prompt, said the plain way."""
    size = held.layout.block_size
    parts = []
    for layer, heads in zip(held.layers, held.heads, strict=True):
        for plane in planes[2 * layer : 2 * layer + 2]:
            part = plane[index * size : (index + 1) * size, heads.start : heads.stop]
            if held.layout.order is BlockOrder.HEADS:
                part = part.transpose(1, 0, 2)
            parts.append(part.reshape(-1))
    return np.concatenate(parts)


def cut(block: npt.NDArray[np.uint8], whole: KvLayout, held: RankLayout) -> npt.NDArray[np.uint8]:
    """What a rank holds of a block of the whole model, whose tokens come first."""
    planes: Planes = []
    for layer, kv in enumerate(whole.layers):
        start = whole.layer_offset_bytes(layer)
        for head_dim in (kv.k_head_dim, kv.v_head_dim):
            row = head_dim * whole.item_bytes
            size = whole.block_size * kv.num_kv_heads * row
            plane = block[start : start + size]
            planes.append(plane.reshape(whole.block_size, kv.num_kv_heads, row))
            start += size
    return block_of(planes, held, 0)


class OnDevice:
    """Memory whose bytes nobody on the host sees in place. Satisfies `KvStore`."""

    def __init__(self, memory: KvMemory) -> None:
        self.layout, self.num_blocks = memory.layout, memory.num_blocks
        self.copy_in, self.copy_out = memory.copy_in, memory.copy_out
        self.copy_within = memory.copy_within
        self.digests, self.are_sound = memory.digests, memory.are_sound
        self.tensor, self.close = memory.tensor, memory.close

    def host_blocks(self, block_ids: Sequence[BlockId]) -> None:
        return None


@dataclass
class KvOnly:
    """An engine that computes nothing. Satisfies `Engine`."""

    spec: EngineSpec
    kv: KvStore
    looks_ahead: bool = False

    async def step(self, batch: StepBatch) -> StepResult:
        raise NotImplementedError

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The KV of one worker: `memories` and `stores` by rank, and what rank 0 asks all of them."""

    layout: ShardedLayout
    memories: Sequence[KvMemory]
    stores: Sequence[KvStore]
    kv: KvStore | RankedKv
    settings: WorkerSettings
    channels: Sequence[tuple[RankChannel, RankChannel]]  # both ends, from rank 1 on

    def fill(self, blocks: npt.NDArray[np.uint8]) -> None:
        """`blocks` of the whole model, [num_blocks, block_bytes]: each rank holds its part."""
        for rank, memory in enumerate(self.memories):
            held = self.layout.rank(rank)
            for place, block in enumerate(blocks):
                memory.block(BlockId(place))[:] = cut(block, self.layout.whole, held).data

    def holds(self, place: int, block: npt.NDArray[np.uint8]) -> bool:
        """Whether all ranks hold their parts of `block` at `place`."""
        return all(
            memory.block(BlockId(place))
            == cut(block, self.layout.whole, self.layout.rank(rank)).data
            for rank, memory in enumerate(self.memories)
        )

    def hello(self, regions: Sequence[RemoteRegion] = ()) -> HandoffHello:
        return HandoffHello(
            worker_id=WorkerId("w"),
            epoch=EPOCH,
            protocol_version=PROTOCOL_VERSION,
            model_hash=b"m" * 16,
            layout=self.layout,
            regions=tuple(regions),
        )


@contextlib.asynccontextmanager
async def ranks_of(
    tp: int,
    pp: int,
    open_service: OpenRankService,
    *,
    role: Role,
    num_blocks: int = NUM_BLOCKS,
    whole: KvLayout = WHOLE,
    memories: Sequence[KvMemory] = (),
    store_of: Callable[[KvMemory], KvStore] = lambda memory: memory,
    **settings: Any,
) -> AsyncIterator[Ranks]:
    """Ranks that do what `open_service` says; rank 0 is the caller.

    Each has memory of its own, unless `memories` are given, which stay the caller's.
    """
    layout = ShardedLayout(whole=whole, tp=tp, pp=pp)
    said = WorkerSettings(role=role, worker_id="w", **{"engine": {"tp": tp, "pp": pp}, **settings})
    spec = EngineSpec(
        kind="none",
        model_name="none",
        model_hash=b"m" * 16,
        tokenizer_hash=b"t" * 16,
        vocab_size=1,
        max_context_tokens=1,
        eos_token_ids=(),
        layout=whole,
        tp=tp,
        pp=pp,
    )
    async with contextlib.AsyncExitStack() as stack:
        if not memories:
            memories = [
                KvMemory(layout.rank(rank).layout, num_blocks) for rank in range(layout.num_ranks)
            ]
            for memory in memories:
                stack.callback(memory.close)
        assert [each.layout for each in memories] == [
            layout.rank(rank).layout for rank in range(layout.num_ranks)
        ]
        stores = [store_of(memory) for memory in memories]
        ends = []
        for rank in range(1, layout.num_ranks):
            first, second = socket.socketpair()
            ours = await RankChannel.open(first, f"rank {rank}")
            stack.push_async_callback(ours.close)
            theirs = await RankChannel.open(second, "rank 0")
            stack.push_async_callback(theirs.close)
            ends.append((ours, theirs))
            parts = RankParts(
                settings=said,
                place=RankPlace(rank=rank, tp=tp, pp=pp),
                engine=cast(Engine, KvOnly(spec, stores[rank])),
                channel=theirs,
            )
            handlers = await stack.enter_async_context(open_service(parts))
            for name, handler in handlers.items():
                theirs.handle(name, handler)
        channels = [ours for ours, _ in ends]
        yield Ranks(
            layout=layout,
            memories=memories,
            stores=stores,
            kv=RankedKv(stores[0], channels, deadline_s=20.0) if channels else stores[0],
            settings=said,
            channels=ends,
        )
