from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdserve.domain.ids import HandoffId, RequestId
from pdserve.engine.digest import DIGEST_BYTES, block_digest

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
