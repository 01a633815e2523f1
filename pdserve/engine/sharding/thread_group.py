"""Ranks that are threads of one process: for the check of a small model before a large one."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from pdserve.domain.errors import RankLost
from pdserve.domain.rank_place import RankPlace

Result = TypeVar("Result")


@dataclass(slots=True)
class _Stage:
    """What ranks put side by side: those of one stage, or all."""

    barrier: threading.Barrier
    tensors: list[Tensor]


@dataclass(slots=True)
class _Worker:
    """What all ranks of a worker share."""

    stages: list[_Stage]
    whole: _Stage  # all ranks
    sent: dict[int, "queue.SimpleQueue[Tensor | None]"]  # by the rank that receives


@dataclass(slots=True)
class ThreadGroup:
    """Satisfies `RankGroup`."""

    place: RankPlace
    deadline_s: float
    _worker: _Worker = field(repr=False)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._in_stage(tensor)).sum(dim=0)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._in_stage(tensor), dim=-1)

    def least(self, number: int, device: torch.device) -> int:
        given = _exchange(
            self._worker.whole, self.place.rank, torch.tensor(number), self.deadline_s
        )
        return min(int(each) for each in given)

    def send(self, tensor: Tensor) -> None:
        self._worker.sent[self.place.rank + self.place.tp].put(tensor.clone())

    def receive(self, tensor: Tensor) -> Tensor:
        try:
            sent = self._worker.sent[self.place.rank].get(timeout=self.deadline_s)
        except queue.Empty as error:
            raise RankLost("the stage before sent nothing") from error
        if sent is None:
            raise RankLost("a rank is gone")
        return tensor.copy_(sent)

    def close(self) -> None:
        """All ranks that wait, or are going to, hear that this one is gone."""
        for stage in (*self._worker.stages, self._worker.whole):
            stage.barrier.abort()
        for sent in self._worker.sent.values():
            sent.put(None)

    def _in_stage(self, tensor: Tensor) -> list[Tensor]:
        stage = self._worker.stages[self.place.stage]
        return _exchange(stage, self.place.shard, tensor, self.deadline_s)


def _exchange(among: _Stage, place: int, tensor: Tensor, deadline_s: float) -> list[Tensor]:
    try:
        among.barrier.wait(deadline_s)
        among.tensors[place] = tensor
        among.barrier.wait(deadline_s)
        given = list(among.tensors)
        among.barrier.wait(deadline_s)
    except threading.BrokenBarrierError as error:
        raise RankLost("another rank is gone") from error
    return given


def thread_groups(tp: int, pp: int, deadline_s: float = 60.0) -> list[ThreadGroup]:
    """One for each rank, for a thread each."""

    def side_by_side(count: int) -> _Stage:
        return _Stage(threading.Barrier(count), [torch.empty(0)] * count)

    worker = _Worker(
        stages=[side_by_side(tp) for _ in range(pp)],
        whole=side_by_side(tp * pp),
        sent={rank: queue.SimpleQueue() for rank in range(tp * pp)},
    )
    return [
        ThreadGroup(RankPlace(rank=rank, tp=tp, pp=pp), deadline_s, worker)
        for rank in range(tp * pp)
    ]


def run_ranks(
    tp: int, pp: int, run: Callable[[ThreadGroup], Result], deadline_s: float = 60.0
) -> list[Result]:
    """What `run` gives for each rank, in a thread each. Raises what `results_of` raises."""
    groups = thread_groups(tp, pp, deadline_s)
    with ThreadPoolExecutor(len(groups), "rank") as threads:
        return results_of([threads.submit(of_rank, group, partial(run, group)) for group in groups])


def of_rank(group: ThreadGroup, call: Callable[[], Result]) -> Result:
    """The result of `call`; if it fails, those who wait for this rank do not wait on."""
    try:
        return call()
    except BaseException:
        group.close()
        raise


def results_of(futures: "Sequence[Future[Result]]") -> list[Result]:
    """Of all ranks, once all have ended; raises the error of one that failed of itself, if any."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda each: isinstance(each, RankLost)):
        raise error
    return [future.result() for future in futures]
