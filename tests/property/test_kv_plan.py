"""Whatever divides the two workers, each byte of a rank's blocks comes from where it is, once.

Sizes of blocks and the order inside them differ, too.
"""

from collections import Counter
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtransfer.landing import Landing
from kvtransfer.plan import copies_of, plan_shares
from kvtransfer.reading import copy_planes
from pdserve.domain.ids import BlockId
from pdserve.domain.kv_demand import num_blocks_for
from pdserve.domain.layout import BlockOrder, KvLayout, LayerKv, ShardedLayout
from tests.support.ranked_kv import Planes, block_of

TPS, PPS = (1, 2, 4, 8, 16), (1, 2, 3, 4, 8)
ITEM_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Two divisions of one model, and the tokens that are wanted of a prompt."""

    source: ShardedLayout
    target: ShardedLayout
    first_block: int  # of the target's
    num_tokens: int


@st.composite
def pairs_of_layouts(draw: st.DrawFn) -> tuple[ShardedLayout, ShardedLayout]:
    """Two divisions of one model, whose layers differ in heads and head sizes."""
    tps = draw(st.tuples(st.sampled_from(TPS), st.sampled_from(TPS)))
    pps = draw(st.tuples(st.sampled_from(PPS), st.sampled_from(PPS)))
    kinds = st.builds(
        LayerKv,
        num_kv_heads=st.sampled_from([1, 2, 4, 8, 16]),
        k_head_dim=st.integers(1, 3),
        v_head_dim=st.integers(0, 3),
    )
    kinds_used = draw(st.lists(kinds, min_size=1, max_size=2))
    layers = draw(st.lists(st.sampled_from(kinds_used), min_size=max(pps), max_size=11))
    whole = KvLayout(layers=tuple(layers), block_size=1, dtype="float32", item_bytes=ITEM_BYTES)
    source, target = (
        ShardedLayout(
            whole=replace(
                whole,
                block_size=draw(st.integers(1, 7)),
                order=draw(st.sampled_from(BlockOrder)),
            ),
            tp=tp,
            pp=pp,
        )
        for tp, pp in zip(tps, pps, strict=True)
    )
    return source, target


@st.composite
def passages(draw: st.DrawFn) -> Passage:
    source, target = draw(pairs_of_layouts())
    first_block = draw(st.integers(0, 3))
    first_token = first_block * target.whole.block_size
    num_tokens = first_token + draw(st.integers(1, 12))
    return Passage(source=source, target=target, first_block=first_block, num_tokens=num_tokens)


def numbered(whole: KvLayout, num_tokens: int) -> Planes:
    """KV whose values are all different; 0 is none of them."""
    planes, first = [], 1
    for kv in whole.layers:
        for head_dim in (kv.k_head_dim, kv.v_head_dim):
            shape = (num_tokens, kv.num_kv_heads, head_dim)
            size = num_tokens * kv.num_kv_heads * head_dim
            values = np.arange(first, first + size, dtype="<u4").reshape(shape)
            planes.append(values.view(np.uint8).reshape(*shape[:2], head_dim * ITEM_BYTES))
            first += size
    return planes


@settings(deadline=None, max_examples=300)
@given(passages(), st.integers(0, 2**32))
def test_every_wanted_byte_of_a_rank_is_right_and_none_is_written_twice(
    passage: Passage, seed: int
) -> None:
    """Of one rank, which any may be, on up to 128 ranks of either side."""
    source, target = passage.source, passage.target
    rank = Random(seed).randrange(target.num_ranks)
    mine = target.rank(rank)
    size, their_size = target.whole.block_size, source.whole.block_size
    end_block = num_blocks_for(passage.num_tokens, size)
    landing = Landing(
        blocks=[BlockId(block) for block in range(end_block - passage.first_block)],
        first_block=passage.first_block,
        block_size=size,
    )
    indices = range(
        landing.first_token // their_size, num_blocks_for(passage.num_tokens, their_size)
    )
    held_until = max(indices.stop * their_size, landing.end_token)
    planes = numbered(source.whole, held_until)
    landed = np.zeros((len(landing.blocks), mine.layout.block_bytes), np.uint8)
    num_written = np.zeros_like(landed)
    for share in plan_shares(source, target, rank):
        theirs = source.rank(share.rank)
        copies = copies_of(share, theirs, mine)
        ones = np.ones(theirs.layout.block_bytes, np.uint8)
        for index in indices:
            block = np.ascontiguousarray(block_of(planes, theirs, index))
            for rows in landing.rows_of(index, their_size):
                copy_planes(copies, block.data, landed[rows.place].data, rows)
                count = np.zeros(mine.layout.block_bytes, np.uint8)
                copy_planes(copies, ones.data, count.data, rows)
                num_written[rows.place] += count
                num_copied = rows.count * sum(copy.token_bytes for copy in copies)
                assert int(count.sum()) == num_copied, "no byte is written twice by one share"
    # What is written: all tokens that are wanted, and none beyond what the source has of them.
    last = min(indices.stop * their_size, landing.end_token)
    is_wanted = [
        np.where(np.arange(held_until)[:, None, None] < last, np.ones_like(plane), 0)
        for plane in planes
    ]
    for place in range(len(landing.blocks)):
        index = landing.first_block + place
        expected = block_of(is_wanted, mine, index).astype(np.uint8)
        assert (num_written[place] == expected).all()
        assert (landed[place] == block_of(planes, mine, index) * expected).all()


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(1, 5))
def test_each_token_of_the_landing_has_one_row_in_one_block_of_the_peer(
    size: int, their_size: int, first_block: int, num_blocks: int
) -> None:
    ids = [BlockId(100 + place) for place in range(num_blocks)]
    landing = Landing(blocks=ids, first_block=first_block, block_size=size)
    found = Counter[int]()
    for index in range(num_blocks_for(landing.end_token, their_size) + 2):
        near = landing.around([index], their_size)
        for rows in landing.rows_of(index, their_size):
            assert (
                near.blocks[rows.place + landing.first_block - near.first_block]
                == (ids[rows.place])
            )
            for row in range(rows.count):
                token = index * their_size + rows.source + row
                assert (landing.first_block + rows.place) * size + rows.target + row == token
                found[token] += 1
        assert len(near.blocks) == len(list(landing.rows_of(index, their_size)))
        assert list(near.rows_of(index, their_size)) == [
            replace(rows, place=rows.place + landing.first_block - near.first_block)
            for rows in landing.rows_of(index, their_size)
        ]
    assert found == Counter(range(landing.first_token, landing.end_token))


ONE_HEAD, TWO_HEADS = (LayerKv(num_kv_heads=heads, k_head_dim=2, v_head_dim=2) for heads in (1, 2))
MIXED = KvLayout(layers=(ONE_HEAD, TWO_HEADS), block_size=1, dtype="uint8", item_bytes=1)


@settings(deadline=None)
@given(pairs_of_layouts())
@example((ShardedLayout(whole=MIXED, tp=4), ShardedLayout(whole=MIXED, tp=2)))
def test_a_rank_that_holds_the_same_heads_gives_all(
    pair: tuple[ShardedLayout, ShardedLayout],
) -> None:
    source, target = pair
    theirs = [source.rank(rank) for rank in range(source.num_ranks)]
    for rank in sorted({0, target.num_ranks // 2, target.num_ranks - 1}):
        mine = target.rank(rank)
        if any(held.has_heads_of(mine) for held in theirs):
            [share] = plan_shares(source, target, rank)
            assert theirs[share.rank].has_heads_of(mine)


def test_ranks_of_equal_divisions_read_their_like() -> None:
    for tp in TPS[:4]:
        for block_size in (1, 3):
            target = ShardedLayout(whole=MIXED, tp=tp, pp=2)
            source = replace(target, whole=replace(MIXED, block_size=block_size))
            shares = [plan_shares(source, target, rank) for rank in range(target.num_ranks)]
            assert [[share.rank for share in each] for each in shares] == [
                [rank] for rank in range(target.num_ranks)
            ]


def test_ranks_that_need_a_head_that_several_hold_spread_over_them() -> None:
    """One KV head on 8 ranks there, on 4 here: no rank is read by two."""
    layer = LayerKv(num_kv_heads=1, k_head_dim=4, v_head_dim=4)
    whole = KvLayout(layers=(layer,) * 4, block_size=2, dtype="float32", item_bytes=4)
    source = ShardedLayout(whole=whole, tp=8)
    target = ShardedLayout(whole=whole, tp=4, pp=2)
    read = Counter(share.rank for rank in range(8) for share in plan_shares(source, target, rank))
    assert read == dict.fromkeys(range(8), 1)


def test_whole_layers_of_one_kind_are_one_copy() -> None:
    """32 layers of 8 heads, half of which are wanted: not one copy for each layer."""
    layer = LayerKv(num_kv_heads=8, k_head_dim=128, v_head_dim=128)
    whole = KvLayout(layers=(layer,) * 32, block_size=16, dtype="bfloat16", item_bytes=2)
    for order in BlockOrder:
        source = ShardedLayout(whole=replace(whole, order=order), tp=2)
        target = ShardedLayout(whole=whole, tp=4)
        [share] = plan_shares(source, target, 3)
        [copy] = copies_of(share, source.rank(share.rank), target.rank(3))
        assert (copy.num_planes, copy.num_heads, copy.head_bytes) == (64, 2, 128 * 2)
