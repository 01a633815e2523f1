"""Frames of the collective transport, from peers that are not trusted."""

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.transports.base import End
from kvtransfer.transports.collective_frames import (
    HEADER_BYTES,
    MAX_BYTES,
    Ending,
    Kind,
    decode_end,
    decode_header,
    decode_hello,
    decode_key,
    decode_piece,
    encode_end,
    encode_hello,
    encode_key,
    encode_piece,
    encode_read,
)
from kvtransfer.transports.requests import BadFrame, decode_block_ids
from pdserve.domain.ids import BlockId, Epoch

TOKEN = bytes(range(16))


def body_of(frame: bytes, kind: Kind) -> bytes:
    assert decode_header(frame[:HEADER_BYTES]) == (kind, len(frame) - HEADER_BYTES)
    return frame[HEADER_BYTES:]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.sampled_from(["gloo", "nccl"]))
def test_a_hello_says_who_reads_and_through_what(epoch: int, rank: int, backend: str) -> None:
    end = End(Epoch(epoch), rank)
    body = body_of(encode_hello(TOKEN, end, backend), Kind.HELLO)
    assert decode_hello(body, TOKEN) == (end, backend)
    with pytest.raises(BadFrame, match="token"):
        decode_hello(body, bytes(16))


@given(st.text(max_size=40), st.binary(max_size=500))
def test_keys_read_ids_pieces_and_endings_come_back(key: str, value: bytes) -> None:
    assert decode_key(body_of(encode_key(key, value), Kind.KEY)) == (key, value)
    ids = [BlockId(7), BlockId(0), BlockId(7)]
    assert decode_block_ids(body_of(encode_read(ids), Kind.READ), 8) == ids
    assert decode_piece(body_of(encode_piece(3), Kind.PIECE), 3) == 3
    for ending in Ending:
        assert decode_end(body_of(encode_end(ending), Kind.END)) is ending


@pytest.mark.parametrize(
    "decode",
    [
        lambda: decode_header(struct.pack("<BI", 0, 0)),
        lambda: decode_header(struct.pack("<BI", 8, 0)),
        *(
            lambda kind=kind: decode_header(struct.pack("<BI", kind, MAX_BYTES[kind] + 1))
            for kind in Kind
        ),
        lambda: decode_hello(b"", TOKEN),
        lambda: decode_key(b"\x05\x00ab"),
        lambda: decode_key(b"\x05"),
        lambda: decode_block_ids(b"", 8),
        lambda: decode_block_ids(bytes(5), 8),
        lambda: decode_block_ids(struct.pack("<I", 8), 8),
        lambda: decode_piece(struct.pack("<I", 0), 4),
        lambda: decode_piece(struct.pack("<I", 5), 4),
        lambda: decode_piece(struct.pack("<I", 1), 0),
        lambda: decode_piece(b"\x01", 4),
        lambda: decode_end(b"\x03"),
        lambda: decode_end(b""),
    ],
)
def test_what_no_correct_peer_says_is_a_bad_frame(decode: Callable[[], object]) -> None:
    with pytest.raises(BadFrame):
        decode()


@given(st.binary(max_size=64))
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    for decode in (
        lambda: decode_hello(body, TOKEN),
        lambda: decode_key(body),
        lambda: decode_block_ids(body, 8),
        lambda: decode_piece(body, 8),
        lambda: decode_end(body),
    ):
        try:
            decode()
        except BadFrame:
            continue
