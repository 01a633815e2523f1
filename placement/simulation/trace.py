"""The arrays that a kernel reads and the ones that it leaves behind."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests by arrival. `prefix_ids[prefix_starts[r]:prefix_starts[r + 1]]` are the ids of the
    prompt's blocks of `prefix_block_tokens` tokens, numbered from 0; equal ids, equal KV."""

    arrival_s: Floats
    prompts: Ints
    outputs: Ints
    prefix_starts: Ints | None = None
    prefix_ids: Ints | None = None
    prefix_block_tokens: int = 512

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What became of each request, on the clock of the trace; infinite where it was refused."""

    arrival_s: Floats  # as in the trace, or when a closed loop sent it
    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    prefill: Ints
    decode: Ints
    busy_s: Floats
    num_refused: int = 0
    prefix_hit_tokens: int = 0
    longest_wait_s: float = 0.0  # predicted to a request that was let in (rules pdserve)
