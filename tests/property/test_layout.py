"""The ranks of a worker hold the whole model, and each (layer, head) equally often."""

from collections import Counter

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pdserve.domain.layout import KvLayout, LayerKv, ShardedLayout
from placement.model_config import catalogue, load_model
from placement.model_spec import Parallelism

MODELS = sorted(catalogue())


@st.composite
def sharded_layouts(draw: st.DrawFn) -> ShardedLayout:
    """Heads of a layer divide by tp, or tp by them."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    divisors = [heads for heads in range(1, tp + 1) if tp % heads == 0]
    layer = st.builds(
        LayerKv,
        num_kv_heads=st.sampled_from(divisors) | st.integers(1, 4).map(lambda times: times * tp),
        k_head_dim=st.integers(1, 9),
        v_head_dim=st.integers(0, 9),
    )
    layers = draw(st.lists(layer, min_size=1, max_size=12))
    whole = KvLayout(
        layers=tuple(layers),
        block_size=draw(st.sampled_from([1, 16])),
        dtype="float16",
        item_bytes=2,
    )
    return ShardedLayout(whole=whole, tp=tp, pp=draw(st.integers(1, min(8, len(layers)))))


@settings(deadline=None)
@given(sharded_layouts())
def test_each_head_of_each_layer_is_held_equally_often(sharded: ShardedLayout) -> None:
    ranks = [sharded.rank(rank) for rank in range(sharded.num_ranks)]
    held = Counter(
        (layer, head)
        for rank in ranks
        for layer, heads in zip(rank.layers, rank.heads, strict=True)
        for head in heads
    )
    expected = {
        (layer, head): max(1, sharded.tp // kv.num_kv_heads)
        for layer, kv in enumerate(sharded.whole.layers)
        for head in range(kv.num_kv_heads)
    }
    assert held == expected


@settings(deadline=None)
@given(sharded_layouts())
def test_blocks_of_the_ranks_add_up_to_those_of_the_model(sharded: ShardedLayout) -> None:
    """A replicated head counts once for each rank that holds it."""
    ranks = [sharded.rank(rank) for rank in range(sharded.num_ranks)]
    per_value = sharded.whole.block_size * sharded.whole.item_bytes
    expected = sum(
        kv.num_values_per_token * max(1, sharded.tp // kv.num_kv_heads) * per_value
        for kv in sharded.whole.layers
    )
    assert sum(rank.layout.block_bytes for rank in ranks) == sharded.block_bytes == expected
    for rank in ranks:
        for layer, heads, held in zip(rank.layers, rank.heads, rank.layout.layers, strict=True):
            assert held.num_kv_heads == len(heads)
            assert held.k_head_dim == sharded.whole.layers[layer].k_head_dim
            assert held.v_head_dim == sharded.whole.layers[layer].v_head_dim


@settings(deadline=None)
@given(sharded_layouts())
def test_stages_take_layers_in_order_and_as_evenly_as_can_be(sharded: ShardedLayout) -> None:
    stages = [sharded.rank(stage * sharded.tp).layers for stage in range(sharded.pp)]
    assert [layer for stage in stages for layer in stage] == list(range(len(sharded.whole.layers)))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1
    for rank in range(sharded.num_ranks):
        assert sharded.rank(rank).layers == stages[rank // sharded.tp]


@settings(deadline=None)
@given(st.sampled_from(MODELS), st.sampled_from([1, 2, 3, 4, 8, 16]), st.integers(1, 8))
def test_planner_counts_the_kv_of_the_fullest_rank(name: str, tp: int, pp: int) -> None:
    spec = load_model(name)
    num_layers = spec.num_full_layers + spec.num_sliding_layers
    assume(pp <= num_layers)
    layer = LayerKv(spec.num_kv_heads, spec.head_dim, spec.head_dim)
    if (latent := spec.latent) is not None:
        layer = LayerKv(1, latent.kv_lora_rank, latent.rope_head_dim)
    assume(layer.num_kv_heads % tp == 0 or tp % layer.num_kv_heads == 0)
    whole = KvLayout(layers=(layer,) * num_layers, block_size=1, dtype="uint8", item_bytes=1)
    sharded = ShardedLayout(whole=whole, tp=tp, pp=pp)
    fullest = max(sharded.rank(rank).layout.block_bytes for rank in range(sharded.num_ranks))
    planned = spec.kv_bytes_per_gpu_token(Parallelism(tp=tp, pp=pp))
    assert planned == fullest * spec.precision.kv_bytes
