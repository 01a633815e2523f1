"""The shape of KV memory: of a whole model, and of each rank of a worker that divides it."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from pdserve.domain.kv_demand import num_blocks_for

MAX_NUM_LAYERS = 1024
MAX_NUM_RANKS = 256
MAX_DTYPE_CHARS = 16
MAX_BLOCK_SIZE = 1024  # tokens; whoever reads blocks of a peer has room for at least one
MAX_SIZE = 2**32 - 1

_ALIGNED_BYTES = 8
_ENOUGH_PARTS = 4


@dataclass(frozen=True, slots=True)
class LayerKv:
    """K and V of one layer: head sizes can differ from each other (MLA) and between layers.

    The latents of MLA are one KV head without V.
    """

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int

    @property
    def num_values_per_token(self) -> int:
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim)


class BlockOrder(StrEnum):
    """What comes first in the K, and in the V, that a block has of one layer."""

    TOKENS = "tokens"  # [block_size, kv_heads, head_dim]: what the CPU reads fastest
    HEADS = "heads"  # [kv_heads, block_size, head_dim]: the tokens of one head are one piece


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Block-major, one contiguous piece a block: `[layers, 2, block_size, kv_heads, head_dim]`.

    Layer l starts at `layer_offset_bytes(l)` in its block; its K comes first, then its V:

        block b:  | L0 K | L0 V | L1 K | L1 V | ... |
                    each  [block_size, kv_heads, head_dim] of `dtype`, or as `order` says

    Raises `ValueError` for sizes that no memory has.
    """

    layers: tuple[LayerKv, ...]
    block_size: int
    dtype: str  # numpy name: float32, float16, bfloat16, uint8
    item_bytes: int
    order: BlockOrder = BlockOrder.TOKENS
    block_bytes: int = field(init=False, repr=False, compare=False)  # asked for at every block

    def __post_init__(self) -> None:
        _check(1, MAX_NUM_LAYERS, layers=len(self.layers))
        _check(1, MAX_DTYPE_CHARS, dtype=len(self.dtype))
        _check(1, MAX_BLOCK_SIZE, block_size=self.block_size)
        _check(1, item_bytes=self.item_bytes)
        for layer in set(self.layers):
            _check(1, num_kv_heads=layer.num_kv_heads, k_head_dim=layer.k_head_dim)
            _check(0, v_head_dim=layer.v_head_dim)
        object.__setattr__(self, "block_bytes", self.layer_offset_bytes(len(self.layers)))

    def __hash__(self) -> int:
        """As much as tells most layouts apart: routers look them up for each request."""
        return hash((len(self.layers), self.block_size, self.dtype))

    def is_same_kv(self, other: "KvLayout") -> bool:
        """Whether both hold the same of each token, however they put tokens into blocks."""
        mine, others = ((each.dtype, each.item_bytes, each.layers) for each in (self, other))
        return mine == others

    def layer_offset_bytes(self, layer: int) -> int:
        values = sum(kv.num_values_per_token for kv in self.layers[:layer])
        return values * self.block_size * self.item_bytes

    @property
    def num_parts(self) -> int:
        """How many parts, of equally many layers and bytes, a block can be moved in; 1: none.

        At least four if the number of layers allows it.
        """
        num_layers = len(self.layers)
        if len(set(self.layers)) > 1 or self.block_bytes // num_layers % _ALIGNED_BYTES:
            return 1
        divisors = [parts for parts in range(1, num_layers + 1) if num_layers % parts == 0]
        return next((parts for parts in divisors if parts >= _ENOUGH_PARTS), num_layers)

    def part(self, num_parts: int) -> "KvLayout":
        """Of memory whose blocks are parts of this one's: part p of block b is block
        `b * num_parts + p` of it.
        """
        return replace(self, layers=self.layers[: len(self.layers) // num_parts])

    def num_blocks_for(self, num_tokens: int) -> int:
        return num_blocks_for(num_tokens, self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """What one rank holds of a block, layer after layer as the whole model's block has it."""

    layers: range  # of the model's layers
    heads: tuple[range, ...]  # of each of these layers' KV heads
    layout: KvLayout  # of this rank's blocks

    def has_heads_of(self, other: "RankLayout") -> bool:
        """Whether both hold the same heads of the same layers, however they put them in blocks."""
        return (self.layers, self.heads) == (other.layers, other.heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedLayout:
    """The KV of a model, divided among `tp * pp` ranks; those of a stage follow one another.

    Stages take the layers in order, as evenly as can be. The ranks of a stage take the KV heads of
    its layers in order; if they are more than the heads, equally many hold each head. Raises
    `ValueError` for a division that does not come out even, or has a rank without layers.
    """

    whole: KvLayout
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        _check(1, MAX_NUM_RANKS, tp=self.tp)
        _check(1, min(len(self.whole.layers), MAX_NUM_RANKS // self.tp), pp=self.pp)
        for num_heads in {layer.num_kv_heads for layer in self.whole.layers}:
            if num_heads % self.tp and self.tp % num_heads:
                raise ValueError(f"{num_heads} KV heads do not divide by tp {self.tp}")

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    @property
    def block_bytes(self) -> int:
        """Of a block in all ranks together; a head that several hold counts as often."""
        return sum(self.rank(rank).layout.block_bytes for rank in range(self.num_ranks))

    def rank(self, rank: int) -> RankLayout:
        """Of one rank, counted from 0; raises `ValueError` for one that there is not."""
        _check(0, self.num_ranks - 1, rank=rank)
        stage, place = divmod(rank, self.tp)
        num_layers = len(self.whole.layers)
        layers = range(stage * num_layers // self.pp, (stage + 1) * num_layers // self.pp)
        whole = [self.whole.layers[layer] for layer in layers]
        heads = tuple(
            range(place * kv.num_kv_heads // self.tp, -(-(place + 1) * kv.num_kv_heads // self.tp))
            for kv in whole
        )
        held = tuple(
            replace(kv, num_kv_heads=len(own)) for kv, own in zip(whole, heads, strict=True)
        )
        return RankLayout(layers=layers, heads=heads, layout=replace(self.whole, layers=held))


def _check(least: int, most: int = MAX_SIZE, **sizes: int) -> None:
    for name, size in sizes.items():
        if not least <= size <= most:
            raise ValueError(f"{name} of a KV layout: must be {least} to {most}; got {size}")
