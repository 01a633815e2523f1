"""How much KV memory a request needs: one rule for the router, the workers and the simulator."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Count = TypeVar("Count", int, npt.NDArray[np.int64])
"""Of one request, or of many."""


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold the KV of `num_tokens` positions."""
    return -(-num_tokens // block_size)


def num_answer_kv_tokens(num_prompt_tokens: Count, max_tokens: Count) -> Count:
    """Positions whose KV is ever needed for the longest answer: the last token's is not."""
    return num_prompt_tokens + max_tokens - 1
