"""The digest that ties a block's bytes to the passage and the place they were offered for.

It is two sums over the block's words, which a GPU adds up where the block lies as easily as a CPU.
With all arithmetic modulo 2**64, `mix` of `pdserve.engine.mixing`, and the block's bytes as little
endian words w[0], w[1], ..., the last one filled up with zeros:

    m[i] = mix(w[i] ^ (key + (i + 1) * GOLDEN))
    n[i] = (m[i] ^ second_key) * FACTORS[0]
    digest = sum of m[i], 8 bytes | sum of n[i] ^ (n[i] >> 32), 8 bytes

`mix` can be undone, so one changed word always changes the first sum, and several changes cancel
out in both only by chance. The keys depend on what the block is for and on its length: stale,
swapped, shortened and foreign blocks differ even where their bytes are equal. Not a signature: it
finds accidents, while a peer that lies about both its bytes and its digests is kept out by
authentication.
"""

import functools
import hashlib
import struct
from collections.abc import Callable

import numpy as np

from pdserve.domain.ids import HandoffId
from pdserve.engine.mixing import FACTORS, GOLDEN, Words, mix

DIGEST_BYTES = 16
WORD_BYTES = 8

_HEADER = struct.Struct("<QQQQ")
_CHUNK_WORDS = 1 << 15  # of the plain form: its intermediate results stay in the cache


def digest_keys(handoff: HandoffId, block_index: int, num_bytes: int) -> tuple[int, int]:
    """The two keys, BLAKE2b of

        | attempt u64 | retry u64 | block_index u64 | num_bytes u64 | request_id, UTF-8 |

    `block_index` counts from the start of the prompt.
    """
    header = _HEADER.pack(handoff.attempt, handoff.retry, block_index, num_bytes)
    hashed = hashlib.blake2b(header + handoff.request_id.encode(), digest_size=DIGEST_BYTES)
    digest = hashed.digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def block_digest(handoff: HandoffId, block_index: int, content: memoryview) -> bytes:
    """The 16 bytes for a block that lies in the host's memory."""
    keys = np.array(digest_keys(handoff, block_index, len(content)), dtype=np.uint64)
    sums = np.zeros(2, dtype=np.uint64)
    add_words = word_sums()
    num_words = len(content) // WORD_BYTES
    if num_words:
        words = np.require(np.frombuffer(content, "<u8", num_words), requirements="A")
        add_words(words, keys[0], keys[1], sums)
    if tail := bytes(content[num_words * WORD_BYTES :]):
        last = np.frombuffer(tail.ljust(WORD_BYTES, b"\0"), "<u8")
        skipped = np.array([num_words * GOLDEN & 2**64 - 1], dtype=np.uint64)
        add_words(last, (keys[:1] + skipped)[0], keys[1], sums)
    return sums.astype("<u8").tobytes()


@functools.cache
def word_sums() -> Callable[..., None]:
    """What adds up words: `pdserve.engine.numba_digest`, or numpy in an installation without numba.

    The first call may take a second; whoever keeps blocks makes it before there is an event loop.
    """
    try:
        from pdserve.engine.numba_digest import compile_digest
    except ModuleNotFoundError:
        return sum_words
    return compile_digest()


def sum_words(words: Words, key: np.uint64, second_key: np.uint64, sums: Words) -> None:
    """sums += what `words`, the first of a block, add to both."""
    with np.errstate(over="ignore"):  # all sums are modulo 2**64
        _sum_chunks(words, key, second_key, sums)


def _sum_chunks(words: Words, key: np.uint64, second_key: np.uint64, sums: Words) -> None:
    places = np.arange(1, min(len(words), _CHUNK_WORDS) + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    places += key
    for start in range(0, len(words), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS]
        mixed = mix(chunk ^ places[: len(chunk)])
        sums[0] += mixed.sum(dtype=np.uint64)
        mixed = (mixed ^ second_key) * np.uint64(FACTORS[0])
        sums[1] += (mixed ^ (mixed >> np.uint64(32))).sum(dtype=np.uint64)
        places += np.uint64(_CHUNK_WORDS * GOLDEN & 2**64 - 1)
