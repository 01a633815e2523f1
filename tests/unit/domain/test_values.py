"""Small rules that everything rests on: layout, prefix names, step times, block counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import StepCoefficients, StepShape, num_attention_pairs
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.domain.prefix import hash_full_blocks

LAYOUT = KvLayout(
    layers=(LayerKv(2, 32, 32), LayerKv(1, 48, 16)), block_size=16, dtype="float32", item_bytes=4
)


def test_block_bytes_are_the_sum_of_layers() -> None:
    assert LAYOUT.layer_offset_bytes(0) == 0
    assert LAYOUT.layer_offset_bytes(1) == 16 * 2 * (32 + 32) * 4
    assert LAYOUT.block_bytes == 16 * (2 * 64 + 64) * 4


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_cover_tokens(tokens: int, blocks: int) -> None:
    assert LAYOUT.num_blocks_for(tokens) == blocks


tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(tokens, tokens, st.integers(1, 8))
def test_names_are_equal_exactly_as_far_as_prefixes_are(
    left: list[int], right: list[int], block_size: int
) -> None:
    names = zip(
        hash_full_blocks(left, block_size), hash_full_blocks(right, block_size), strict=False
    )
    for index, (a, b) in enumerate(names):
        end = (index + 1) * block_size
        assert (a == b) == (left[:end] == right[:end])
    assert len(hash_full_blocks(left, block_size)) == len(left) // block_size


def test_salt_separates_names() -> None:
    prompt = list(range(16))
    assert hash_full_blocks(prompt, 16, b"a") != hash_full_blocks(prompt, 16, b"b")


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_attention_pairs_do_not_depend_on_chunking(start: int, first: int, second: int) -> None:
    whole = num_attention_pairs(start, first + second)
    assert whole == num_attention_pairs(start, first) + num_attention_pairs(start + first, second)


def test_step_time_is_linear_in_what_the_step_holds() -> None:
    coefficients = StepCoefficients(
        fixed_s=1.0,
        prefill_token_s=0.1,
        prefill_attention_s=0.01,
        decode_token_s=0.5,
        decode_context_token_s=0.001,
    )
    shape = StepShape.of(prefill_chunks=[(2, 3)], decode_contexts=[10, 20])
    # 3 tokens; pairs 3 + 4 + 5 = 12; two decodes over 30 tokens
    assert coefficients.step_s(shape) == pytest.approx(1.0 + 0.3 + 0.12 + 1.0 + 0.03)
    assert coefficients.prefill_s(0, 10, 4) == pytest.approx(3.0 + 1.0 + 0.55)


def test_usage_that_does_not_add_up_cannot_be_built() -> None:
    with pytest.raises(AssertionError):
        KvUsage(free=1, reserved=1, held=0, pinned=0, total=3)
    assert not KvUsage(free=1, reserved=1, held=0, pinned=0, total=2).is_idle
