"""KV layouts to protobuf and back, for the hellos between workers and to routers."""

import functools
import itertools

from pdserve.domain.layout import MAX_NUM_LAYERS, BlockOrder, KvLayout, LayerKv, ShardedLayout
from pdserve.rpc.alike import message_of, value_of
from pdserve.v1 import layout_pb2 as pb
from pdserve.v1.membership_pb2 import WorkerHello
from pdserve.v1.prefill_pb2 import HandoffHello

MAX_NUM_BYTES = 64 * MAX_NUM_LAYERS
"""Of a layout on the wire; more than any that is valid takes."""


def layout_to_proto(layout: ShardedLayout | None) -> pb.ShardedLayout | None:
    if layout is None:
        return None
    runs = [
        message_of(pb.LayerKv, layer, num_layers=len(list(run)))
        for layer, run in itertools.groupby(layout.whole.layers)
    ]
    return message_of(pb.ShardedLayout, layout.whole, layers=runs, tp=layout.tp, pp=layout.pp)


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
    runs = ([value_of(LayerKv, run)] * run.num_layers for run in message.layers)
    layers = tuple(itertools.chain.from_iterable(runs))
    if message.order not in set(BlockOrder):
        raise ValueError(f"order of a KV layout: must be tokens or heads; got {message.order!r}")
    whole = value_of(KvLayout, message, layers=layers, order=BlockOrder(message.order))
    return ShardedLayout(whole=whole, tp=message.tp, pp=message.pp)
