import struct
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.domain.ids import HandoffId, RequestId
from pdserve.engine.digest import (
    DIGEST_BYTES,
    block_digest,
    digest_keys,
    sum_words,
    word_sums,
)
from pdserve.engine.mixing import FACTORS, GOLDEN, SHIFTS

word_sums()  # compiled here, and not within the deadline of an example

HANDOFFS = st.builds(
    HandoffId,
    request_id=st.text(max_size=20).map(RequestId),
    attempt=st.integers(0, 2**32 - 1),
    retry=st.integers(0, 2**32 - 1),
)
INDICES = st.integers(0, 2**32 - 1)
CONTENTS = st.binary(min_size=1, max_size=300)


@given(HANDOFFS, INDICES, CONTENTS)
def test_digest_is_16_bytes_and_the_same_for_the_same_bytes_elsewhere(
    handoff: HandoffId, index: int, content: bytes
) -> None:
    digest = block_digest(handoff, index, memoryview(content))
    assert len(digest) == DIGEST_BYTES
    assert digest == block_digest(handoff, index, memoryview(bytearray(content)))


@given(HANDOFFS, INDICES, CONTENTS, st.data())
def test_any_flipped_bit_changes_the_digest(
    handoff: HandoffId, index: int, content: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    clean = block_digest(handoff, index, memoryview(content))
    assert block_digest(handoff, index, memoryview(damaged)) != clean


@given(HANDOFFS, INDICES, CONTENTS, st.integers(1, 300))
def test_a_truncated_block_changes_the_digest(
    handoff: HandoffId, index: int, content: bytes, num_lost: int
) -> None:
    clean = block_digest(handoff, index, memoryview(content))
    assert block_digest(handoff, index, memoryview(content[:-num_lost])) != clean


@given(HANDOFFS, INDICES, INDICES, CONTENTS)
def test_the_same_bytes_at_another_position_have_another_digest(
    handoff: HandoffId, index: int, other: int, content: bytes
) -> None:
    view = memoryview(content)
    is_same = block_digest(handoff, index, view) == block_digest(handoff, other, view)
    assert is_same == (index == other)


@given(HANDOFFS, HANDOFFS, INDICES, CONTENTS)
def test_the_same_bytes_of_another_handoff_have_another_digest(
    handoff: HandoffId, other: HandoffId, index: int, content: bytes
) -> None:
    view = memoryview(content)
    is_same = block_digest(handoff, index, view) == block_digest(other, index, view)
    assert is_same == (handoff == other)


@given(HANDOFFS, INDICES, CONTENTS)
def test_each_field_of_the_name_counts(handoff: HandoffId, index: int, content: bytes) -> None:
    view = memoryview(content)
    names = [
        handoff,
        replace(handoff, request_id=RequestId(handoff.request_id + "x")),
        replace(handoff, attempt=handoff.attempt + 1),
        replace(handoff, retry=handoff.retry + 1),
        replace(handoff, attempt=handoff.attempt + 1, retry=handoff.retry + 1),
    ]
    assert len({block_digest(name, index, view) for name in names}) == len(names)


@given(st.text(min_size=1, max_size=10), CONTENTS)
def test_a_byte_cannot_move_between_name_and_content(name: str, content: bytes) -> None:
    short, moved = name[:-1], name[-1].encode() + content
    whole = block_digest(HandoffId(RequestId(name), 1, 1), 0, memoryview(content))
    assert block_digest(HandoffId(RequestId(short), 1, 1), 0, memoryview(moved)) != whole


def digest_by_definition(handoff: HandoffId, index: int, content: bytes) -> bytes:
    """One word after the other, in whole numbers."""
    mask = 2**64 - 1
    key, second_key = digest_keys(handoff, index, len(content))
    padded = content + bytes(-len(content) % 8)
    first = second = 0
    for place, (word,) in enumerate(struct.iter_unpack("<Q", padded), start=1):
        word ^= (key + place * GOLDEN) & mask
        word = (word ^ (word >> SHIFTS[0])) * FACTORS[0] & mask
        word = (word ^ (word >> SHIFTS[1])) * FACTORS[1] & mask
        word ^= word >> SHIFTS[2]
        first += word
        word = (word ^ second_key) * FACTORS[0] & mask
        second += word ^ (word >> 32)
    return struct.pack("<QQ", first & mask, second & mask)


@given(HANDOFFS, INDICES, st.binary(max_size=300))
def test_the_digest_is_the_one_that_is_written_down(
    handoff: HandoffId, index: int, content: bytes
) -> None:
    expected = digest_by_definition(handoff, index, content)
    assert block_digest(handoff, index, memoryview(content)) == expected


@pytest.mark.parametrize("num_words", [1, 2, 1000, (1 << 15) - 1, 1 << 15, (1 << 16) + 3])
def test_compiled_and_plain_sums_agree(num_words: int) -> None:
    assert word_sums() is not sum_words, "numba is here"
    words = np.frombuffer(Random(num_words).randbytes(8 * num_words), np.uint64)
    keys = np.array([2**64 - 5, 2**63 + 11], dtype=np.uint64)
    compiled, plain = np.array([[3, 2**64 - 1]] * 2, dtype=np.uint64)
    word_sums()(words, keys[0], keys[1], compiled)
    sum_words(words, keys[0], keys[1], plain)
    assert compiled.tolist() == plain.tolist()


def test_bytes_that_are_not_aligned_have_the_digest_of_those_that_are() -> None:
    content, handoff = Random(3).randbytes(203), HandoffId(RequestId("r"), 1, 0)
    for skipped in range(9):
        moved = memoryview(bytes(skipped) + content)[skipped:]
        assert block_digest(handoff, 4, moved) == block_digest(handoff, 4, memoryview(content))


WORDS = st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=60)


@given(HANDOFFS, INDICES, WORDS, st.data())
def test_swapped_torn_and_shifted_content_has_another_digest(
    handoff: HandoffId, index: int, words: list[int], data: st.DataObject
) -> None:
    """Words trade places, the beginning is of another block, all move on, or two change at once."""
    places = st.integers(0, len(words) - 1)
    one, other = data.draw(places), data.draw(places)
    swapped = list(words)
    swapped[one], swapped[other] = words[other], words[one]
    torn = [word ^ data.draw(st.integers(1, 2**64 - 1)) for word in words[: one + 1]]
    shifted = words[1:] + words[:1]
    doubled = list(words)
    change = data.draw(st.integers(1, 2**64 - 1))
    doubled[one] = (words[one] + change) % 2**64
    doubled[other] = (doubled[other] - change) % 2**64
    clean = block_digest(handoff, index, memoryview(struct.pack(f"<{len(words)}Q", *words)))
    for changed in (swapped, torn + words[one + 1 :], shifted, doubled):
        content = memoryview(struct.pack(f"<{len(words)}Q", *changed))
        assert (block_digest(handoff, index, content) == clean) == (changed == words)
