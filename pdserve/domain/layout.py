"""The shape of KV memory, and the hash that two workers must share to exchange it."""

import hashlib
from dataclasses import dataclass

from pdserve.domain.kv_demand import num_blocks_for


@dataclass(frozen=True, slots=True)
class LayerKv:
    """K and V of one layer: head sizes can differ from each other (MLA) and between layers."""

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int

    @property
    def num_values_per_token(self) -> int:
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Block-major, one contiguous piece a block: `[layers, 2, block_size, kv_heads, head_dim]`.

    Layer l starts at `layer_offset_bytes(l)` in its block; its K comes first, then its V:

        block b:  | L0 K | L0 V | L1 K | L1 V | ... |
                    each  [block_size, kv_heads, head_dim] of `dtype`
    """

    layers: tuple[LayerKv, ...]
    block_size: int
    dtype: str  # numpy name: float32, float16, bfloat16, uint8
    item_bytes: int

    @property
    def block_bytes(self) -> int:
        values = sum(layer.num_values_per_token for layer in self.layers)
        return values * self.block_size * self.item_bytes

    def layer_offset_bytes(self, layer: int) -> int:
        values = sum(kv.num_values_per_token for kv in self.layers[:layer])
        return values * self.block_size * self.item_bytes

    def digest(self) -> bytes:
        """16 bytes; equal only for layouts whose blocks mean the same byte for byte."""
        text = repr((self.layers, self.block_size, self.dtype, self.item_bytes))
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def num_blocks_for(self, num_tokens: int) -> int:
        return num_blocks_for(num_tokens, self.block_size)
