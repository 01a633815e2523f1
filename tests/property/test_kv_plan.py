"""Whatever divides the two workers, each byte of a rank's blocks comes from where it is, once."""

from collections import Counter
from random import Random

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtransfer.plan import copies_of, plan_shares
from kvtransfer.reading import copy_planes
from pdserve.domain.layout import KvLayout, LayerKv, ShardedLayout
from tests.support.ranked_kv import cut

TPS, PPS = (1, 2, 4, 8), (1, 2, 3, 4)


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
    layers = draw(st.lists(st.sampled_from(kinds_used), min_size=max(pps), max_size=9))
    whole = KvLayout(
        layers=tuple(layers),
        block_size=draw(st.integers(1, 3)),
        dtype="float16",
        item_bytes=draw(st.sampled_from([1, 2])),
    )
    source, target = (
        ShardedLayout(whole=whole, tp=tp, pp=pp) for tp, pp in zip(tps, pps, strict=True)
    )
    return source, target


@settings(deadline=None, max_examples=300)
@given(pairs_of_layouts(), st.integers(0, 2**32))
def test_every_byte_of_every_rank_is_right_and_none_is_written_twice(
    pair: tuple[ShardedLayout, ShardedLayout], seed: int
) -> None:
    source, target = pair
    block = np.frombuffer(Random(seed).randbytes(source.whole.block_bytes), np.uint8)
    held = [cut(block, source.whole, source.rank(rank)) for rank in range(source.num_ranks)]
    for rank in range(target.num_ranks):
        mine = target.rank(rank)
        landed = np.zeros(mine.layout.block_bytes, np.uint8)
        num_written = np.zeros(mine.layout.block_bytes, np.uint8)
        for share in plan_shares(source, target, rank):
            theirs = source.rank(share.rank)
            copies = copies_of(share, theirs, mine)
            copy_planes(copies, held[share.rank].data, landed.data)
            count = np.zeros(mine.layout.block_bytes, np.uint8)
            ones = np.ones(theirs.layout.block_bytes, np.uint8)
            copy_planes(copies, ones.data, count.data)
            num_written += count
            assert int(count.sum()) == sum(
                copy.num_planes * copy.num_rows * copy.row_bytes for copy in copies
            ), "a byte is written once by the copies of one share"
        assert (num_written == 1).all()
        assert (landed == cut(block, target.whole, mine)).all()


ONE_HEAD, TWO_HEADS = (LayerKv(num_kv_heads=heads, k_head_dim=2, v_head_dim=2) for heads in (1, 2))
MIXED = KvLayout(layers=(ONE_HEAD, TWO_HEADS), block_size=1, dtype="uint8", item_bytes=1)


@settings(deadline=None)
@given(pairs_of_layouts())
@example((ShardedLayout(whole=MIXED, tp=4), ShardedLayout(whole=MIXED, tp=2)))
def test_a_rank_that_holds_the_same_gives_all(pair: tuple[ShardedLayout, ShardedLayout]) -> None:
    source, target = pair
    theirs = [source.rank(rank) for rank in range(source.num_ranks)]
    for rank in range(target.num_ranks):
        mine = target.rank(rank)
        if mine in theirs:
            [share] = plan_shares(source, target, rank)
            assert theirs[share.rank] == mine


def test_ranks_of_equal_divisions_read_their_like() -> None:
    for tp in TPS:
        layout = ShardedLayout(whole=MIXED, tp=tp, pp=2)
        shares = [plan_shares(layout, layout, rank) for rank in range(layout.num_ranks)]
        assert [[share.rank for share in each] for each in shares] == [
            [rank] for rank in range(layout.num_ranks)
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
    source, target = ShardedLayout(whole=whole, tp=2), ShardedLayout(whole=whole, tp=4)
    [share] = plan_shares(source, target, 3)
    [copy] = copies_of(share, source.rank(share.rank), target.rank(3))
    assert (copy.num_planes, copy.num_rows, copy.row_bytes) == (64, 16, 2 * 128 * 2)
