"""What a rank holds, by example; which workers can exchange KV, and why others cannot."""

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest

from pdserve.domain.ids import PROTOCOL_VERSION
from pdserve.domain.layout import (
    MAX_NUM_LAYERS,
    MAX_NUM_RANKS,
    KvLayout,
    LayerKv,
    ShardedLayout,
    exchange_obstacle,
)

LAYER = LayerKv(num_kv_heads=4, k_head_dim=32, v_head_dim=16)
WHOLE = KvLayout(layers=(LAYER,) * 5, block_size=16, dtype="float32", item_bytes=4)
ONE_RANK = ShardedLayout(whole=WHOLE)


@dataclass(frozen=True, kw_only=True)
class Peer:
    protocol_version: int = PROTOCOL_VERSION
    model_hash: bytes = b"\x0a" * 16
    layout: ShardedLayout | None = ONE_RANK


def test_only_rank_of_a_worker_holds_the_whole_model() -> None:
    only = ONE_RANK.rank(0)
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
        (2048, 1, "tp .* must be 1 to 1024; got 2048"),
        (1, 0, "pp .* must be 1 to 5; got 0"),
        (1, 6, "pp .* must be 1 to 5; got 6"),
        (256, 5, "pp .* must be 1 to 4; got 5"),
    ],
)
def test_division_that_leaves_a_rank_without_its_share_is_an_error(
    tp: int, pp: int, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        ShardedLayout(whole=WHOLE, tp=tp, pp=pp)


def test_workers_that_say_the_same_of_their_one_rank_exchange_kv() -> None:
    other = ShardedLayout(whole=replace(WHOLE, layers=tuple([replace(LAYER)] * 5)))
    assert exchange_obstacle(Peer(), Peer(layout=other)) is None
    assert hash(other) == hash(ONE_RANK)


@pytest.mark.parametrize(
    ("prefill", "why"),
    [
        (Peer(protocol_version=9), "protocol version: 1 at the decode worker, 9 at the prefill"),
        (Peer(model_hash=b"\xff"), "model: 0a0a.* at the decode worker, ff at the prefill worker"),
        (
            Peer(layout=ShardedLayout(whole=replace(WHOLE, dtype="bfloat16", item_bytes=2))),
            "KV dtype: float32 at the decode worker, bfloat16 at the prefill worker",
        ),
        (
            Peer(layout=ShardedLayout(whole=replace(WHOLE, block_size=32))),
            "block size: 16 at the decode worker, 32 at the prefill worker",
        ),
        (Peer(layout=ShardedLayout(whole=replace(WHOLE, layers=(LAYER,)))), "layers differ"),
        (
            Peer(layout=ShardedLayout(whole=WHOLE, tp=2, pp=5)),
            "ranks: tp 1 pp 1 at the decode worker, tp 2 pp 5 at the prefill worker",
        ),
        (Peer(layout=None), "too old to describe its KV"),
    ],
)
def test_workers_that_differ_exchange_no_kv_and_are_told_why(prefill: Peer, why: str) -> None:
    assert re.search(why, exchange_obstacle(Peer(), prefill) or "")
    assert exchange_obstacle(prefill, Peer()) is not None


def test_no_transfer_exists_between_workers_of_several_ranks() -> None:
    several = Peer(layout=ShardedLayout(whole=WHOLE, tp=2))
    assert "one rank only" in (exchange_obstacle(several, several) or "")


def test_workers_of_an_older_version_are_left_to_each_other() -> None:
    assert exchange_obstacle(Peer(layout=None), Peer(layout=None)) is None
    assert exchange_obstacle(Peer(layout=None), Peer(layout=None, model_hash=b"")) is not None
