"""Tokens that go from one step to the next without the host.

    step n    logits ─▶ draws ─┬─▶ host: text, stops, the client
                               ▼
                          kept tokens
                               ▼
    step n+1  rows that follow a draw take its token; the others have theirs from the host

So the host can submit step n+1 before it knows what step n draws.
"""

import torch
from torch import Tensor

from pdserve.engine.device.runtime import DeviceRuntime


class TokenFeed:
    """The tokens that the last step drew, at one place of the device, where graphs find them."""

    def __init__(self, runtime: DeviceRuntime, capacity: int) -> None:
        """Keeps the first `capacity` tokens of a step."""
        self.capacity = capacity
        self._kept = runtime.empty(capacity, dtype=torch.int64)
        self._kept.zero_()

    def keep(self, tokens: Tensor) -> None:
        """Take the draws of a step, int64 [rows]; of one that failed token 0 is kept."""
        count = min(len(tokens), self.capacity)
        self._kept[:count].copy_(tokens[:count].clamp(min=0))

    def fill(self, token_ids: Tensor, sources: Tensor) -> Tensor:
        """`token_ids`, but the kept token of that place where `sources` is not negative."""
        return torch.where(sources < 0, token_ids, self._kept.index_select(0, sources.clamp(min=0)))
