"""One call of the attention operator, as its implementations get it."""

from dataclasses import dataclass

from torch import Tensor

from pdserve.engine.device.variants import AttentionKind


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRequest:
    """Rows of a packed batch and the paged memory that they join; all on one device."""

    query: Tensor  # [rows, heads, k_head_dim]
    key: Tensor  # [rows, kv_heads, k_head_dim]
    value: Tensor  # [rows, kv_heads, v_head_dim]
    k_cache: Tensor  # [num_blocks, block_size, kv_heads, k_head_dim], any strides, the last 1
    v_cache: Tensor  # [num_blocks, block_size, kv_heads, v_head_dim], likewise
    scaling: float  # this and the next four as in `AttentionCall`
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    splits: int = 1  # parts of the keys that are attended apart
    rows_per_tile: int = 1  # of the plan

    def kind(self) -> AttentionKind:
        """What all calls of this layer have in common."""
        k_block, k_place, k_head, _ = self.k_cache.stride()
        v_block, v_place, v_head, _ = self.v_cache.stride()
        return AttentionKind(
            dtype=str(self.query.dtype).removeprefix("torch."),
            heads=self.query.shape[1],
            kv_heads=self.k_cache.shape[2],
            k_head_dim=self.k_cache.shape[3],
            v_head_dim=self.v_cache.shape[3],
            block_size=self.k_cache.shape[1],
            k_strides=(k_block, k_place, k_head),
            v_strides=(v_block, v_place, v_head),
            window=self.window,
            chunk=self.chunk,
            is_capped=self.softcap > 0,
            has_sinks=self.sinks is not None,
        )
