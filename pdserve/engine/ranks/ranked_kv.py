"""The KV of a worker of many ranks: rank 0 asks all of them, since each holds a part of a block."""

from collections.abc import Mapping, Sequence

import numpy as np

from pdserve.domain.errors import RankLost
from pdserve.domain.ids import BlockId, HandoffId, RequestId
from pdserve.engine.digest import DIGEST_BYTES
from pdserve.engine.kv_store import KvStore
from pdserve.engine.ranks.channel import Handler, RankChannel
from pdserve.engine.ranks.frames import Message
from pdserve.engine.side_by_side import side_by_side

_DIGESTS, _ARE_SOUND = "kv.digests", "kv.are_sound"
_INTS = np.dtype("<i8")


class RankedKv:
    """Satisfies `KvBlocks` for rank 0, whose own part is `own`; `channels` go to ranks 1, 2, ...

    A rank that does not answer within `deadline_s` is lost (`RankLost`).
    """

    def __init__(self, own: KvStore, channels: Sequence[RankChannel], *, deadline_s: float) -> None:
        self.own = own
        self.channels = channels
        self.num_blocks = own.num_blocks
        self._deadline_s = deadline_s

    async def digests(
        self, handoff: HandoffId, block_indices: Sequence[int], block_ids: Sequence[BlockId]
    ) -> list[bytes]:
        question = Message(handoff_fields(handoff), ints_to_bytes(block_indices, block_ids))
        own, *others = await side_by_side(
            [
                self.own.digests(handoff, block_indices, block_ids),
                *(self._digests(channel, question, len(block_ids)) for channel in self.channels),
            ]
        )
        return [b"".join(ranks) for ranks in zip(own, *others, strict=True)]

    async def _digests(self, channel: RankChannel, question: Message, count: int) -> list[bytes]:
        answer = await channel.ask(_DIGESTS, question, deadline_s=self._deadline_s)
        if len(answer.body) != count * DIGEST_BYTES:
            raise RankLost(f"{channel.peer} made {len(answer.body)} bytes of digests for {count}")
        return split(answer.body, DIGEST_BYTES)

    async def are_sound(self, block_ids: Sequence[BlockId]) -> list[bool]:
        question = Message({}, ints_to_bytes(block_ids))
        own, *others = await side_by_side(
            [
                self.own.are_sound(block_ids),
                *(self._are_sound(channel, question) for channel in self.channels),
            ]
        )
        return [all(ranks) for ranks in zip(own, *others, strict=True)]

    async def _are_sound(self, channel: RankChannel, question: Message) -> list[bool]:
        answer = await channel.ask(_ARE_SOUND, question, deadline_s=self._deadline_s)
        return [byte == 1 for byte in answer.body]


def own_store(kv: KvStore | RankedKv) -> KvStore:
    """What this process holds itself of an engine's KV."""
    return kv.own if isinstance(kv, RankedKv) else kv


def kv_handlers(memory: KvStore) -> Mapping[str, Handler]:
    """What a rank other than 0 answers about its part."""

    async def digests(message: Message) -> Message:
        indices, block_ids = bytes_to_ints(message.body, 2)
        handoff = handoff_of(message.fields)
        found = await memory.digests(handoff, indices, [BlockId(block) for block in block_ids])
        return Message({}, b"".join(found))

    async def are_sound(message: Message) -> Message:
        [block_ids] = bytes_to_ints(message.body, 1)
        sound = await memory.are_sound([BlockId(block) for block in block_ids])
        return Message({}, bytes(sound))

    return {_DIGESTS: digests, _ARE_SOUND: are_sound}


def handoff_fields(handoff: HandoffId) -> dict[str, str | int]:
    return {
        "request_id": handoff.request_id,
        "attempt": handoff.attempt,
        "retry": handoff.retry,
    }


def handoff_of(fields: Mapping[str, object]) -> HandoffId:
    request_id, attempt, retry = (fields[name] for name in ("request_id", "attempt", "retry"))
    return HandoffId(RequestId(str(request_id)), int(str(attempt)), int(str(retry)))


def ints_to_bytes(*lists: Sequence[int]) -> bytes:
    """Lists of one length, one after the other."""
    return b"".join(np.asarray(each, dtype=_INTS).tobytes() for each in lists)


def bytes_to_ints(data: bytes | memoryview, num_lists: int) -> list[list[int]]:
    lists: list[list[int]] = np.frombuffer(data, dtype=_INTS).reshape(num_lists, -1).tolist()
    return lists


def split(data: bytes | memoryview, size: int) -> list[bytes]:
    """The parts of `size` bytes that `data` was joined from."""
    return [bytes(data[start : start + size]) for start in range(0, len(data), size)]
