import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.transports.base import End
from kvtransfer.transports.requests import (
    MAX_BLOCKS_PER_REQUEST,
    TOKEN_BYTES,
    BadFrame,
    decode_block_ids,
)
from kvtransfer.transports.tcp_frames import (
    REPLY_HEADER_BYTES,
    REQUEST_HEADER_BYTES,
    Status,
    decode_reply,
    decode_request_header,
    encode_reply,
    encode_request,
)
from pdserve.domain.ids import BlockId, Epoch

TOKEN = bytes(range(TOKEN_BYTES))
READER = End(Epoch(2**63 - 1), 7)


@given(
    st.lists(st.integers(0, 999).map(BlockId), min_size=1, max_size=50), st.integers(0, 2**16 - 1)
)
def test_a_request_reads_back_as_it_was_written(block_ids: list[BlockId], num_parts: int) -> None:
    frame = encode_request(TOKEN, READER, block_ids, num_parts)
    reader, parts, num_blocks = decode_request_header(frame[:REQUEST_HEADER_BYTES], TOKEN)
    assert (reader, parts) == (READER, num_parts)
    body = frame[REQUEST_HEADER_BYTES:]
    assert len(body) == 4 * num_blocks
    assert decode_block_ids(body, 1000) == block_ids


def test_a_request_with_another_token_is_bad() -> None:
    frame = encode_request(bytes(TOKEN_BYTES), READER, [BlockId(0)])
    with pytest.raises(BadFrame):
        decode_request_header(frame[:REQUEST_HEADER_BYTES], TOKEN)


@pytest.mark.parametrize("num_blocks", [0, MAX_BLOCKS_PER_REQUEST + 1, 2**32 - 1])
def test_a_request_for_nothing_or_for_too_much_is_bad(num_blocks: int) -> None:
    frame = bytearray(encode_request(TOKEN, READER, [BlockId(0)])[:REQUEST_HEADER_BYTES])
    frame[-4:] = num_blocks.to_bytes(4, "little")
    with pytest.raises(BadFrame):
        decode_request_header(frame, TOKEN)


def test_a_block_beyond_the_region_is_bad() -> None:
    body = encode_request(TOKEN, READER, [BlockId(5)])[REQUEST_HEADER_BYTES:]
    assert decode_block_ids(body, 6) == [5]
    with pytest.raises(BadFrame):
        decode_block_ids(body, 5)


@given(st.binary(min_size=REQUEST_HEADER_BYTES, max_size=REQUEST_HEADER_BYTES))
def test_no_bytes_make_the_request_decoder_raise_anything_else(header: bytes) -> None:
    with contextlib.suppress(BadFrame):
        assert 0 < decode_request_header(header, TOKEN)[2] <= MAX_BLOCKS_PER_REQUEST


@given(st.binary(min_size=REPLY_HEADER_BYTES, max_size=REPLY_HEADER_BYTES), st.integers(0, 2**40))
def test_a_reply_announces_exactly_what_was_asked_or_is_a_refusal_or_bad(
    header: bytes, num_bytes: int
) -> None:
    with contextlib.suppress(BadFrame):
        status = decode_reply(header, num_bytes)
        sent = num_bytes if status is Status.OK else 0
        assert encode_reply(status, sent) == header


def test_a_reply_of_another_length_is_bad() -> None:
    assert decode_reply(encode_reply(Status.OK, 64), 64) is Status.OK
    assert decode_reply(encode_reply(Status.NOT_ON_OFFER, 0), 64) is Status.NOT_ON_OFFER
    for frame in (encode_reply(Status.OK, 63), encode_reply(Status.NOT_ON_OFFER, 64)):
        with pytest.raises(BadFrame):
            decode_reply(frame, 64)
