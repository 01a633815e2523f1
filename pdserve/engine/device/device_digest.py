"""`pdserve.engine.digest` in torch's operators, for blocks that lie on a device."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pdserve.engine.digest import WORD_BYTES
from pdserve.engine.mixing import FACTORS, GOLDEN, SHIFTS


def signed(word: int) -> int:
    """The int64 of the same 64 bits: torch has no arithmetic of unsigned words."""
    return word - (1 << 64) if word >= 1 << 63 else word


def shifted(words: Tensor, num_bits: int) -> Tensor:
    """int64 words moved to the right as unsigned ones are."""
    return (words >> num_bits) & ((1 << (64 - num_bits)) - 1)


def mixed(words: Tensor) -> Tensor:
    """`pdserve.engine.mixing.mix` of int64 words."""
    words = (words ^ shifted(words, SHIFTS[0])) * signed(FACTORS[0])
    words = (words ^ shifted(words, SHIFTS[1])) * signed(FACTORS[1])
    return words ^ shifted(words, SHIFTS[2])


def digest_sums(blocks: Tensor, keys: Tensor) -> Tensor:
    """The two sums of each block, int64 [blocks, 2].

    blocks: uint8 [blocks, block_bytes]; keys: int64 [blocks, 2]; on one device.
    """
    num_spare = -blocks.shape[1] % WORD_BYTES
    if num_spare:
        blocks = torch.nn.functional.pad(blocks, (0, num_spare))
    words = blocks.contiguous().view(torch.int64)
    places = torch.arange(1, words.shape[1] + 1, device=blocks.device) * signed(GOLDEN)
    words = mixed(words ^ (places + keys[:, :1]))
    first = words.sum(1)
    words = (words ^ keys[:, 1:]) * signed(FACTORS[0])
    return torch.stack([first, (words ^ shifted(words, 32)).sum(1)], 1)


def signed_keys(keys: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """What `digest_keys` gives for each block, as int64 [blocks, 2]."""
    return np.array(keys, dtype=np.uint64).view(np.int64)
