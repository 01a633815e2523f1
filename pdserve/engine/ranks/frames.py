"""Messages between ranks as bytes: small things as JSON, arrays and the like beside it as they are.

    u32 bytes of header │ u32 bytes of body │ header: one JSON object │ body

Nothing that is received can run code: there is no pickle.
"""

import asyncio
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_HEADER_BYTES = 16 << 20
MAX_BODY_BYTES = 1 << 30
_SIZES = struct.Struct("<II")


class BadFrame(ValueError):
    """The peer sends something else than frames."""


@dataclass(frozen=True, slots=True)
class Message:
    """`fields` are what JSON knows; `body` is any bytes."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | memoryview = b""


def frame(head: Mapping[str, Any], body: bytes | memoryview = b"") -> bytes:
    header = json.dumps(head, separators=(",", ":")).encode()
    if len(header) > MAX_HEADER_BYTES or len(body) > MAX_BODY_BYTES:
        raise ValueError(
            f"a message between ranks has at most {MAX_HEADER_BYTES} bytes of fields and "
            f"{MAX_BODY_BYTES} of body; got {len(header)} and {len(body)}"
        )
    return b"".join((_SIZES.pack(len(header), len(body)), header, body))


async def read_frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """The next header and body.

    Raises `asyncio.IncompleteReadError` at the end of the stream and `BadFrame` for anything else
    than a frame.
    """
    header_bytes, body_bytes = _SIZES.unpack(await reader.readexactly(_SIZES.size))
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise BadFrame(f"a frame of {header_bytes} and {body_bytes} bytes")
    header = await reader.readexactly(header_bytes)
    body = await reader.readexactly(body_bytes)
    try:
        head = json.loads(header)
    except ValueError:
        raise BadFrame("a header that is not JSON") from None
    if not isinstance(head, dict):
        raise BadFrame("a header that is no object")
    return head, body
