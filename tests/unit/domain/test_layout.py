"""What a rank holds, by example; sizes and divisions that there are not."""

from dataclasses import replace
from typing import Any

import pytest

from pdserve.domain.layout import (
    MAX_NUM_LAYERS,
    MAX_NUM_RANKS,
    KvLayout,
    LayerKv,
    ShardedLayout,
)

LAYER = LayerKv(num_kv_heads=4, k_head_dim=32, v_head_dim=16)
WHOLE = KvLayout(layers=(LAYER,) * 5, block_size=16, dtype="float32", item_bytes=4)


def test_only_rank_of_a_worker_holds_the_whole_model() -> None:
    only = ShardedLayout(whole=WHOLE).rank(0)
    assert (only.layers, only.heads) == (range(5), (range(4),) * 5)
    assert only.layout == WHOLE


def test_ranks_of_a_stage_follow_one_another() -> None:
    sharded = ShardedLayout(whole=WHOLE, tp=2, pp=2)
    held = [sharded.rank(rank) for rank in range(sharded.num_ranks)]
    assert [each.layers for each in held] == [range(2), range(2), range(2, 5), range(2, 5)]
    assert [each.heads[0] for each in held] == [range(2), range(2, 4)] * 2
    assert held[1].layout == replace(WHOLE, layers=(replace(LAYER, num_kv_heads=2),) * 2)


def test_latents_are_replicated_on_all_ranks_of_a_stage() -> None:
    latent = LayerKv(num_kv_heads=1, k_head_dim=576, v_head_dim=0)
    sharded = ShardedLayout(whole=replace(WHOLE, layers=(latent,) * 4), tp=4, pp=2)
    for rank in range(8):
        assert sharded.rank(rank).heads == (range(1),) * 2
        assert sharded.rank(rank).layout.block_bytes == sharded.whole.block_bytes // 2


@pytest.mark.parametrize("rank", [-1, 4])
def test_rank_that_there_is_not_is_an_error(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank of a KV layout: must be 0 to 3; got {rank}"):
        ShardedLayout(whole=WHOLE, tp=2, pp=2).rank(rank)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layers": ()}, f"layers of a KV layout: must be 1 to {MAX_NUM_LAYERS}; got 0"),
        ({"layers": (LAYER,) * 1025}, "layers of a KV layout: must be 1 to 1024; got 1025"),
        ({"layers": (LAYER, replace(LAYER, num_kv_heads=0))}, "num_kv_heads .* got 0"),
        ({"layers": (replace(LAYER, k_head_dim=0),)}, "k_head_dim .* got 0"),
        ({"layers": (replace(LAYER, v_head_dim=-1),)}, "v_head_dim .* must be 0 to .* got -1"),
        ({"block_size": 0}, "block_size .* got 0"),
        ({"item_bytes": 0}, "item_bytes .* got 0"),
        ({"dtype": ""}, "dtype .* got 0"),
        ({"dtype": "x" * 17}, "dtype .* must be 1 to 16; got 17"),
    ],
)
def test_sizes_that_no_memory_has_are_an_error(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(WHOLE, **change)


@pytest.mark.parametrize(
    ("tp", "pp", "why"),
    [
        (3, 1, "4 KV heads do not divide by tp 3"),
        (6, 1, "4 KV heads do not divide by tp 6"),
        (0, 1, f"tp .* must be 1 to {MAX_NUM_RANKS}; got 0"),
        (2048, 1, "tp .* must be 1 to 256; got 2048"),
        (1, 0, "pp .* must be 1 to 5; got 0"),
        (1, 6, "pp .* must be 1 to 5; got 6"),
        (64, 5, "pp .* must be 1 to 4; got 5"),
    ],
)
def test_division_that_leaves_a_rank_without_its_share_is_an_error(
    tp: int, pp: int, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        ShardedLayout(whole=WHOLE, tp=tp, pp=pp)
