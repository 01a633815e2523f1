"""What a reader and a server of the tcp transport say to each other.

    request:  | "PDKV" | version u16 | token 16 | reader: epoch u64 | rank u32 |
              num_parts u16 | num_blocks u32 |
              then  | block id u32 | ...   of parts, if num_parts of them make a block
    reply:    | status u8 | num_bytes u64 | zeros up to 64 |  then the blocks, one after the other

Integers are little-endian. One request at a time on a connection. Every length is checked before
anything is read or allocated for it. The zeros keep the blocks aligned with cache lines, which the
kernel's copies are a tenth faster for.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum

from kvtransfer.transports.base import End
from kvtransfer.transports.requests import (
    MAX_BLOCKS_PER_REQUEST,
    TOKEN_BYTES,
    BadFrame,
    check_greeting,
    encode_block_ids,
)
from pdserve.domain.ids import BlockId, Epoch

_MAGIC = b"PDKV"
_VERSION = 3
_REQUEST = struct.Struct(f"<4sH{TOKEN_BYTES}sQIHI")
_REPLY = struct.Struct("<BQ55x")
REQUEST_HEADER_BYTES = _REQUEST.size
REPLY_HEADER_BYTES = _REPLY.size


class Status(IntEnum):
    OK = 0
    NOT_ON_OFFER = 1


def encode_request(
    token: bytes, reader: End, block_ids: Sequence[BlockId], num_parts: int = 1
) -> bytes:
    body = encode_block_ids(block_ids)
    fields = (token, reader.epoch, reader.rank, num_parts, len(block_ids))
    return _REQUEST.pack(_MAGIC, _VERSION, *fields) + body


def decode_request_header(header: bytes | bytearray, token: bytes) -> tuple[End, int, int]:
    """Who reads, how many make a block of those whose ids follow, and how many ids that are.

    Raises `BadFrame`, also if `token` is another.
    """
    magic, version, given, epoch, rank, num_parts, num_blocks = _REQUEST.unpack(header)
    check_greeting((magic, version, given), (_MAGIC, _VERSION, token))
    if not 0 < num_blocks <= MAX_BLOCKS_PER_REQUEST:
        raise BadFrame(f"{num_blocks} blocks in one request")
    return End(Epoch(epoch), rank), int(num_parts), int(num_blocks)


def encode_reply(status: Status, num_bytes: int) -> bytes:
    return _REPLY.pack(status, num_bytes)


def decode_reply(header: bytes | bytearray, num_bytes: int) -> Status:
    """Raises `BadFrame` unless it is a refusal or announces exactly `num_bytes`."""
    code, announced = _REPLY.unpack(header)
    if code == Status.NOT_ON_OFFER and announced == 0:
        return Status.NOT_ON_OFFER
    if code == Status.OK and announced == num_bytes:
        return Status.OK
    raise BadFrame(f"status {code} with {announced} bytes where {num_bytes} were asked for")
