"""Workers of many ranks inside one test: threads in place of processes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pdserve.domain.lengths import LengthRule
from pdserve.engine.contract import StepBatch
from pdserve.engine.paged_model import PagedModel
from pdserve.engine.sharding.thread_group import ThreadGroup, of_rank, results_of, thread_groups

DEADLINE_S = 120.0


class RankThreads:
    """Acts as one `PagedModel`: every step is run by all ranks, each in its thread."""

    def __init__(self, tp: int, pp: int, load: Callable[[ThreadGroup], PagedModel]) -> None:
        self.groups = thread_groups(tp, pp, DEADLINE_S)
        self._threads = ThreadPoolExecutor(tp * pp, "rank")
        try:
            self.ranks: list[PagedModel] = self._all(
                [partial(load, group) for group in self.groups]
            )
        except BaseException:
            self._threads.shutdown()
            raise

    @property
    def length_rule(self) -> LengthRule:
        rules = {rank.length_rule for rank in self.ranks}
        assert len(rules) == 1
        return rules.pop()

    def forward(self, batch: StepBatch) -> Tensor:
        """The logits of the rank that draws; the other shards of its stage have the same bits."""
        logits: list[Tensor] = self._all([partial(rank.forward, batch) for rank in self.ranks])
        last = [
            own for own, group in zip(logits, self.groups, strict=True) if group.place.is_last_stage
        ]
        assert all(torch.equal(own, last[0]) for own in last)
        return last[0]

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self._threads.shutdown()

    def _all(self, calls: list[Callable[[], Any]]) -> list[Any]:
        futures = [
            self._threads.submit(of_rank, group, call)
            for group, call in zip(self.groups, calls, strict=True)
        ]
        return results_of(futures)


@contextmanager
def rank_threads(
    tp: int, pp: int, load: Callable[[ThreadGroup], PagedModel]
) -> Iterator[RankThreads]:
    ranks = RankThreads(tp, pp, load)
    try:
        yield ranks
    finally:
        ranks.close()
