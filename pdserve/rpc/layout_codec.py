"""KV layouts to protobuf and back, for the hellos between workers and to routers."""

import functools
import itertools

from pdserve.domain.layout import MAX_NUM_LAYERS, KvLayout, LayerKv, ShardedLayout
from pdserve.v1 import layout_pb2 as pb
from pdserve.v1.membership_pb2 import WorkerHello
from pdserve.v1.prefill_pb2 import HandoffHello

MAX_NUM_BYTES = 64 * MAX_NUM_LAYERS
"""Of a layout on the wire; more than any that is valid takes."""


def layout_to_proto(layout: ShardedLayout | None) -> pb.ShardedLayout | None:
    if layout is None:
        return None
    whole = layout.whole
    runs = [
        pb.LayerKv(
            num_layers=len(list(alike)),
            num_kv_heads=layer.num_kv_heads,
            k_head_dim=layer.k_head_dim,
            v_head_dim=layer.v_head_dim,
        )
        for layer, alike in itertools.groupby(whole.layers)
    ]
    return pb.ShardedLayout(
        layers=runs,
        block_size=whole.block_size,
        dtype=whole.dtype,
        item_bytes=whole.item_bytes,
        tp=layout.tp,
        pp=layout.pp,
    )


def layout_from_proto(hello: HandoffHello | WorkerHello) -> ShardedLayout | None:
    """What a hello says; None if its sender's version is older. Equal layouts are one object.

    Raises `ValueError` for a layout that no worker has.
    """
    if not hello.HasField("layout"):
        return None
    if (num_bytes := hello.layout.ByteSize()) > MAX_NUM_BYTES:
        raise ValueError(f"a KV layout may have {MAX_NUM_BYTES} bytes; got {num_bytes}")
    return _layout_of(hello.layout.SerializeToString(deterministic=True))


@functools.lru_cache(maxsize=64)
def _layout_of(data: bytes) -> ShardedLayout:
    """Routers compare layouts for each request; those that are one object are equal at once."""
    message = pb.ShardedLayout.FromString(data)
    num_layers = sum(run.num_layers for run in message.layers)
    if num_layers > MAX_NUM_LAYERS:
        raise ValueError(f"a KV layout may have {MAX_NUM_LAYERS} layers; got {num_layers}")
    layers = itertools.chain.from_iterable(
        (LayerKv(run.num_kv_heads, run.k_head_dim, run.v_head_dim),) * run.num_layers
        for run in message.layers
    )
    whole = KvLayout(
        layers=tuple(layers),
        block_size=message.block_size,
        dtype=message.dtype,
        item_bytes=message.item_bytes,
    )
    return ShardedLayout(whole=whole, tp=message.tp, pp=message.pp)
