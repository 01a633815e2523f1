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
    """What the ranks of one stage put side by side."""

    barrier: threading.Barrier
    tensors: list[Tensor]


@dataclass(slots=True)
class _Worker:
    """What all ranks of a worker share."""

    stages: list[_Stage]
    sent: dict[int, "queue.SimpleQueue[Tensor | None]"]  # by the rank that receives


@dataclass(slots=True)
class ThreadGroup:
    """Satisfies `RankGroup`."""

    place: RankPlace
    deadline_s: float
    _worker: _Worker = field(repr=False)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(tensor)).sum(dim=0)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._exchange(tensor), dim=-1)

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
        for stage in self._worker.stages:
            stage.barrier.abort()
        for sent in self._worker.sent.values():
            sent.put(None)

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        stage = self._worker.stages[self.place.stage]
        try:
            stage.barrier.wait(self.deadline_s)
            stage.tensors[self.place.shard] = tensor
            stage.barrier.wait(self.deadline_s)
            given = list(stage.tensors)
            stage.barrier.wait(self.deadline_s)
        except threading.BrokenBarrierError as error:
            raise RankLost("a rank of this stage is gone") from error
        return given


def thread_groups(tp: int, pp: int, deadline_s: float = 60.0) -> list[ThreadGroup]:
    """One for each rank, for a thread each."""
    worker = _Worker(
        stages=[_Stage(threading.Barrier(tp), [torch.empty(0)] * tp) for _ in range(pp)],
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
