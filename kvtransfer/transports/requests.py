"""What transports share that ask a peer for blocks over a connection, with a token."""

import asyncio
import contextlib
import hmac
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Self

from pdserve.domain.errors import TransferFailed
from pdserve.domain.ids import BlockId
from pdserve.domain.invariants import check_invariant
from pdserve.domain.messages import RemoteRegion

TOKEN_BYTES = 16
MAX_BLOCKS_PER_REQUEST = 16_384


class BadFrame(Exception):
    """Not what a correct peer of this region says: the connection is dropped."""


@dataclass(frozen=True, slots=True)
class TokenAddress:
    """Where a region is served, and what a reader says to be let in."""

    host: str
    port: int
    token: bytes

    @classmethod
    def of(cls, region: RemoteRegion) -> Self:
        """Raises `TransferFailed` for an address that is none."""
        try:
            said = region.address
            parsed = cls(said["host"], int(said["port"]), bytes.fromhex(said["token"]))
        except (KeyError, ValueError) as error:
            raise TransferFailed("the peer's address cannot be read") from error
        if not 0 < parsed.port < 1 << 16 or len(parsed.token) != TOKEN_BYTES or not parsed.host:
            raise TransferFailed("the peer's address makes no sense")
        return parsed


@contextlib.asynccontextmanager
async def read_within(
    total_timeout_s: float, idle_timeout_s: float, on_fault: Callable[[], None] = lambda: None
) -> AsyncIterator[None]:
    """Raises `TransferFailed` if the read inside takes too long or the connection fails it.

    A `TimeoutError` that comes from inside says that nothing moved for `idle_timeout_s`.
    """
    try:
        async with asyncio.timeout(total_timeout_s) as patience:
            yield
    except TimeoutError as error:
        on_fault()
        if patience.expired():
            message = f"the peer took longer than {total_timeout_s:g} s"
        else:
            message = f"the peer was silent for {idle_timeout_s:g} s"
        raise TransferFailed(message) from error
    except (OSError, BadFrame) as error:
        on_fault()
        raise TransferFailed("the connection to the peer broke") from error


def check_greeting(said: tuple[bytes, int, bytes], expected: tuple[bytes, int, bytes]) -> None:
    """Magic, version and token, which takes equally long to check however wrong it is."""
    if said[:2] != expected[:2]:
        raise BadFrame("not this protocol")
    if not hmac.compare_digest(said[2], expected[2]):
        raise BadFrame("a token of another region, or of another life of this process")


def encode_block_ids(block_ids: Sequence[BlockId]) -> bytes:
    is_legal = 0 < len(block_ids) <= MAX_BLOCKS_PER_REQUEST
    check_invariant(is_legal, "a request asks for blocks within the limit", len(block_ids))
    return struct.pack(f"<{len(block_ids)}I", *block_ids)


def decode_block_ids(body: bytes | bytearray, num_blocks_in_region: int) -> list[BlockId]:
    """The ids, all of them within the region; raises `BadFrame`."""
    if not body or len(body) % 4:
        raise BadFrame(f"{len(body)} bytes of block ids")
    block_ids = struct.unpack(f"<{len(body) // 4}I", body)
    if max(block_ids) >= num_blocks_in_region:
        raise BadFrame(f"block {max(block_ids)} of {num_blocks_in_region}")
    return [BlockId(block_id) for block_id in block_ids]
