"""Which workers can exchange KV, and why others cannot."""

import re
from dataclasses import replace
from typing import Any

import pytest

from pdserve.domain.ids import PROTOCOL_VERSION, Epoch, WorkerId
from pdserve.domain.kv_exchange import exchange_obstacle
from pdserve.domain.layout import BlockOrder, KvLayout, LayerKv, ShardedLayout
from pdserve.domain.messages import HandoffHello

LAYER = LayerKv(num_kv_heads=4, k_head_dim=32, v_head_dim=16)
WHOLE = KvLayout(layers=(LAYER,) * 5, block_size=16, dtype="float32", item_bytes=4)
ONE_RANK = ShardedLayout(whole=WHOLE)


def peer(**changes: Any) -> HandoffHello:
    hello = HandoffHello(
        worker_id=WorkerId("w"),
        epoch=Epoch(1),
        protocol_version=PROTOCOL_VERSION,
        model_hash=b"\x0a" * 16,
        layout=ONE_RANK,
    )
    return replace(hello, **changes)


def test_workers_that_say_the_same_of_their_one_rank_exchange_kv() -> None:
    other = ShardedLayout(whole=replace(WHOLE, layers=tuple([replace(LAYER)] * 5)))
    assert exchange_obstacle(peer(), peer(layout=other)) is None
    assert hash(other) == hash(ONE_RANK)


@pytest.mark.parametrize(
    ("prefill", "why"),
    [
        (
            peer(protocol_version=9),
            f"version: {PROTOCOL_VERSION} at the decode worker, 9 at",
        ),
        (peer(model_hash=b"\xff"), "model: 0a0a.* at the decode worker, ff at the prefill worker"),
        (
            peer(layout=ShardedLayout(whole=replace(WHOLE, dtype="bfloat16", item_bytes=2))),
            "KV dtype: float32 at the decode worker, bfloat16 at the prefill worker",
        ),
        (peer(layout=ShardedLayout(whole=replace(WHOLE, layers=(LAYER,)))), "layers differ"),
        (peer(layout=None), "too old to describe its KV"),
    ],
)
def test_workers_that_differ_exchange_no_kv_and_are_told_why(
    prefill: HandoffHello, why: str
) -> None:
    assert re.search(why, exchange_obstacle(peer(), prefill) or "")
    assert exchange_obstacle(prefill, peer()) is not None


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 5), (8, 3)])
def test_workers_exchange_kv_however_their_ranks_divide_it(tp: int, pp: int) -> None:
    several = peer(layout=ShardedLayout(whole=WHOLE, tp=tp, pp=pp))
    assert exchange_obstacle(several, several) is None
    assert exchange_obstacle(several, peer()) is None
    assert exchange_obstacle(peer(), several) is None


@pytest.mark.parametrize(
    "whole",
    [replace(WHOLE, block_size=1), replace(WHOLE, block_size=24, order=BlockOrder.HEADS)],
)
def test_workers_exchange_kv_whatever_their_blocks_are_like(whole: KvLayout) -> None:
    other = peer(layout=ShardedLayout(whole=whole, tp=2))
    assert exchange_obstacle(other, peer()) is None
    assert exchange_obstacle(peer(), other) is None


def test_workers_of_an_older_version_are_left_to_each_other() -> None:
    assert exchange_obstacle(peer(layout=None), peer(layout=None)) is None
    assert exchange_obstacle(peer(layout=None), peer(layout=None, model_hash=b"")) is not None
