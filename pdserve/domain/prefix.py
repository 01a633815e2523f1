"""Names of KV blocks by content: a chain of hashes over a prompt's full blocks."""

import hashlib
from collections.abc import Sequence

import numpy as np

from pdserve.domain.tokens import slices

_TOKEN_BYTES = 4


def hash_full_blocks(
    token_ids: Sequence[int], block_size: int, salt: bytes = b""
) -> tuple[bytes, ...]:
    """Return one 16-byte name for each *full* block of `token_ids`, first block first.

    Name i covers tokens 0..(i+1)*block_size: equal names mean equal prefixes. `salt` (at most 64
    bytes) separates models and tenants. Keyed BLAKE2b, since the builtin `hash` can be made to
    collide by whoever writes the prompts.
    """
    packed = b"".join(np.asarray(part, dtype="<u4").tobytes() for part in slices(token_ids))
    block_bytes = block_size * _TOKEN_BYTES
    names: list[bytes] = []
    parent = b""
    for end in range(block_bytes, len(packed) + 1, block_bytes):
        block = packed[end - block_bytes : end]
        parent = hashlib.blake2b(parent + block, digest_size=16, key=salt).digest()
        names.append(parent)
    return tuple(names)
