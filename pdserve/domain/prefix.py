"""Names of KV blocks by content: a chain of hashes over a prompt's full blocks."""

import hashlib
from collections.abc import Sequence

import numpy as np


def hash_full_blocks(
    token_ids: Sequence[int], block_size: int, salt: bytes = b""
) -> tuple[bytes, ...]:
    """Return one 16-byte name for each *full* block of `token_ids`, first block first.

    Name i covers tokens 0..(i+1)*block_size: equal names mean equal prefixes. `salt` (at most 64
    bytes) separates models and tenants. Keyed BLAKE2b, since the builtin `hash` can be made to
    collide by whoever writes the prompts.
    """
    packed = np.asarray(token_ids, dtype="<u4")
    names: list[bytes] = []
    parent = b""
    for end in range(block_size, len(packed) + 1, block_size):
        block = packed[end - block_size : end].tobytes()
        parent = hashlib.blake2b(parent + block, digest_size=16, key=salt).digest()
        names.append(parent)
    return tuple(names)
