"""What a rank holds of its model, said by the model itself."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pdserve.domain.layout import KvLayout, LayerKv, RankLayout, ShardedLayout
from pdserve.domain.lengths import LengthRule
from pdserve.domain.rank_place import RankPlace
from pdserve.engine.attention import DenseAttention, attending
from pdserve.engine.model_probe import discover_layout, plain_logits, refusal
from pdserve.engine.model_shape import item_bytes

_SHARE = "pdserve_share"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """Of a model that `tp * pp` ranks hold together; alike on all of them but for `place`."""

    place: RankPlace
    whole_layers: tuple[LayerKv, ...]
    length_rule: LengthRule

    @property
    def layers(self) -> range:
        """Those of the model that this rank computes."""
        num_layers, pp, stage = len(self.whole_layers), self.place.pp, self.place.stage
        return range(stage * num_layers // pp, (stage + 1) * num_layers // pp)

    def sharded_layout(self, *, block_size: int, dtype: str) -> ShardedLayout:
        """Of the KV of the whole model among its ranks."""
        whole = KvLayout(
            layers=self.whole_layers,
            block_size=block_size,
            dtype=dtype,
            item_bytes=item_bytes(dtype),
        )
        return ShardedLayout(whole=whole, tp=self.place.tp, pp=self.place.pp)

    def rank_layout(self, *, block_size: int, dtype: str) -> RankLayout:
        """Of the KV that this rank holds."""
        return self.sharded_layout(block_size=block_size, dtype=dtype).rank(self.place.rank)

    def layout_of(self, model: Any, *, block_size: int, dtype: str) -> KvLayout:
        """Of the KV of this rank's `model`, as its attention asks for it; `LocalFault` if unfit."""
        layout = discover_layout(
            model, block_size=block_size, dtype=dtype, num_layers=len(self.layers)
        )
        told = self.rank_layout(block_size=block_size, dtype=dtype).layout
        if layout != told:
            raise refusal(model, "a rank of it keeps other KV than its share of the whole model's")
        return layout


def dense_logits(model: Any, token_ids: Tensor, length: int) -> Tensor:
    """As `plain_logits`, of a rank's model: with our attention, but without a cache."""
    with attending(DenseAttention()):
        return plain_logits(model, token_ids, length)


def set_share(model: Any, share: RankShare) -> None:
    setattr(model, _SHARE, share)


def share_of(model: Any) -> RankShare | None:
    """None for a whole model."""
    share: RankShare | None = vars(model).get(_SHARE)
    return share
