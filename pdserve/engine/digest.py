"""The digest that ties a block's bytes to the passage and the place they were offered for."""

import struct

import xxhash

from pdserve.domain.ids import HandoffId

DIGEST_BYTES = 16

_HEADER = struct.Struct("<QQQI")


def block_digest(handoff: HandoffId, block_index: int, content: memoryview) -> bytes:
    """16 bytes of xxh3-128 over what the block is for, then what it holds.

    `block_index` counts from the start of the prompt. The header that goes in front of `content`:

        | attempt u64 | retry u64 | block_index u64 | len(request_id) u32 | request_id, UTF-8 |

    The length makes it unambiguous, so stale, swapped and foreign blocks differ even where their
    bytes are equal. Not a signature: it finds accidents, while a peer that lies about both its
    bytes and its digests is kept out by authentication.
    """
    request_id = handoff.request_id.encode()
    header = _HEADER.pack(handoff.attempt, handoff.retry, block_index, len(request_id))
    hasher = xxhash.xxh3_128(header + request_id)
    hasher.update(content)
    digest: bytes = hasher.digest()
    return digest
