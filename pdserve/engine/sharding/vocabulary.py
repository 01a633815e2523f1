"""Embedding and output layer divided by tokens: each rank has the rows of some."""

import torch
from torch import Tensor
from torch.nn import Module

from pdserve.engine.rank_group import RankGroup
from pdserve.engine.sharding.cutting import Cut
from pdserve.engine.sharding.joining import Joined


def vocabulary_part(vocab_size: int, shard: int, tp: int) -> tuple[int, int, int]:
    """First and end token of a shard, and how many rows it has: the last ones may be spare."""
    num_rows = -(-vocab_size // tp)
    first = min(shard * num_rows, vocab_size)
    return first, min(first + num_rows, vocab_size), num_rows


def vocabulary_cut(vocab_size: int, shard: int, tp: int) -> Cut:
    """The shard's rows of a tensor that has one for each token."""
    first, end, _ = vocabulary_part(vocab_size, shard, tp)
    return Cut(dim=0, spans=((first, end),))


class ShardedEmbedding(Joined):
    """Looks up the tokens that this rank has; the others' ranks add theirs."""

    def __init__(self, inner: Module, group: RankGroup, vocab_size: int) -> None:
        super().__init__(inner, group)
        self._first, self._end, _ = vocabulary_part(vocab_size, group.place.shard, group.place.tp)

    def forward(self, token_ids: Tensor) -> Tensor:
        is_elsewhere = (token_ids < self._first) | (token_ids >= self._end)
        own: Tensor = self.inner((token_ids - self._first).masked_fill(is_elsewhere, 0))
        return self.group.all_reduce(own.masked_fill(is_elsewhere.unsqueeze(-1), 0))


class GatheredHead(Joined):
    """Computes the logits of this rank's tokens, and gives those of all."""

    def __init__(self, inner: Module, group: RankGroup, vocab_size: int) -> None:
        super().__init__(inner, group)
        self._vocab_size = vocab_size

    def forward(self, rows: Tensor) -> Tensor:
        own: Tensor = self.inner(rows)
        return self.group.all_gather(own.contiguous())[..., : self._vocab_size]


def shrink_embedding(module: Module, num_rows: int) -> None:
    """Have torch's checks of an embedding's sizes agree with its rows."""
    if isinstance(module, torch.nn.Embedding):
        module.num_embeddings, module.padding_idx = num_rows, None
