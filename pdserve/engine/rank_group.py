"""What the ranks of a worker say to each other in the middle of a step."""

from typing import Protocol

import torch
from torch import Tensor

from pdserve.domain.rank_place import RankPlace


class RankGroup(Protocol):
    """The ranks of one worker, seen by one of them.

    All ranks of a stage call the same operations in the same order with tensors of the same shape.
    Each call raises `RankLost` once a rank is gone or silent for longer than the group's deadline;
    nobody uses the group after that.
    """

    place: RankPlace

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of this stage, the same bits on each; may overwrite `tensor`."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of this stage's ranks, joined along the last dimension in rank order."""
        ...

    def least(self, number: int, device: torch.device) -> int:
        """The least of the numbers that all ranks of the worker give, each with its own device."""
        ...

    def send(self, tensor: Tensor) -> None:
        """Hand `tensor` to the rank of the same shard in the next stage."""
        ...

    def receive(self, tensor: Tensor) -> Tensor:
        """Fill `tensor` from the rank of the same shard in the stage before."""
        ...

    def close(self) -> None:
        """Let go of connections; safe to call twice."""
        ...
