"""What the two ends of a pair say to each other beside the bytes of blocks.

    | kind u8 | num_bytes u32 | body |

    reader                              owner
    HELLO who, token, backend     ──▶
    KEY name, value               ◀──▶  KEY      until both have made the group
    MADE                          ◀──▶  MADE
    READ block ids                ──▶
                                  ◀──   PIECE num_blocks: they are being sent through the group
    STOP: no more pieces          ──▶            any time; it may cross with the END
                                  ◀──   END of the reply, and how it ended

Integers are little-endian. Every length is checked before anything is kept for it.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
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
from pdserve.domain.invariants import check_invariant

MAX_NUM_KEYS = 64
"""Of one group. gloo and NCCL need a handful."""

_MAX_KEY_BYTES = 8192
_MAGIC = b"PDKC"
_VERSION = 1
_HEADER = struct.Struct("<BI")
_HELLO = struct.Struct(f"<4sH{TOKEN_BYTES}sQI4s")
HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    HELLO = 1
    KEY = 2
    MADE = 3
    READ = 4
    PIECE = 5
    STOP = 6
    END = 7


MAX_BYTES = {
    Kind.HELLO: _HELLO.size,
    Kind.KEY: _MAX_KEY_BYTES,
    Kind.MADE: 0,
    Kind.READ: 4 * MAX_BLOCKS_PER_REQUEST,
    Kind.PIECE: 4,
    Kind.STOP: 0,
    Kind.END: 1,
}


class Ending(IntEnum):
    """How a reply ended."""

    ALL_SENT = 0
    NOT_ON_OFFER = 1
    STOPPED = 2


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    body: bytes


def encode(kind: Kind, body: bytes = b"") -> bytes:
    check_invariant(len(body) <= MAX_BYTES[kind], "a frame is within its limit", kind, len(body))
    return _HEADER.pack(kind, len(body)) + body


def decode_header(header: bytes | bytearray | memoryview) -> tuple[Kind, int]:
    """The kind and how many bytes follow; raises `BadFrame`."""
    number, num_bytes = _HEADER.unpack(header)
    try:
        kind = Kind(number)
    except ValueError:
        raise BadFrame(f"a frame of kind {number}") from None
    if num_bytes > MAX_BYTES[kind]:
        raise BadFrame(f"{num_bytes} bytes in a frame of kind {kind.name}")
    return kind, int(num_bytes)


def encode_hello(token: bytes, reader: End, backend: str) -> bytes:
    body = _HELLO.pack(_MAGIC, _VERSION, token, reader.epoch, reader.rank, backend.encode())
    return encode(Kind.HELLO, body)


def decode_hello(body: bytes, token: bytes) -> tuple[End, str]:
    """Who reads and through what; raises `BadFrame`, also if `token` is another."""
    if len(body) != _HELLO.size:
        raise BadFrame("a hello of another length")
    magic, version, given, epoch, rank, backend = _HELLO.unpack(body)
    check_greeting((magic, version, given), (_MAGIC, _VERSION, token))
    return End(Epoch(epoch), rank), backend.rstrip(b"\0").decode("ascii", "replace")


def encode_key(key: str, value: bytes) -> bytes:
    name = key.encode()
    return encode(Kind.KEY, struct.pack("<H", len(name)) + name + value)


def decode_key(body: bytes) -> tuple[str, bytes]:
    if len(body) < 2 or (end := 2 + struct.unpack_from("<H", body)[0]) > len(body):
        raise BadFrame("a key that is cut off")
    return body[2:end].decode("utf-8", "replace"), body[end:]


def encode_read(block_ids: Sequence[BlockId]) -> bytes:
    return encode(Kind.READ, encode_block_ids(block_ids))


def encode_piece(num_blocks: int) -> bytes:
    return encode(Kind.PIECE, struct.pack("<I", num_blocks))


def decode_piece(body: bytes, max_num_blocks: int) -> int:
    if len(body) != 4 or not 0 < (num_blocks := struct.unpack("<I", body)[0]) <= max_num_blocks:
        raise BadFrame(f"a piece of other than 1 to {max_num_blocks} blocks")
    return int(num_blocks)


def encode_end(ending: Ending) -> bytes:
    return encode(Kind.END, bytes([ending]))


def decode_end(body: bytes) -> Ending:
    if len(body) != 1 or body[0] not in list(Ending):
        raise BadFrame("an end of no known kind")
    return Ending(body[0])
