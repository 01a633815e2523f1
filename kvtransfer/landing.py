"""Which rows of our blocks take the tokens of a peer's blocks, whose size may be another.

    the peer's, 16 tokens   | 3              | 4              | 5              |
    ours, 24 tokens         | 2                      | 3                      |
                              rows 0-15        16-23    0-7     8-23

A handoff begins with a block of ours, and not always with one of the peer's: tokens before it are
left alone, since others may share the blocks that they are in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pdserve.domain.ids import BlockId
from pdserve.domain.kv_demand import num_blocks_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """Blocks of ours for tokens of a prompt that follow one another."""

    blocks: Sequence[BlockId]
    first_block: int  # in the prompt, counted in blocks of `block_size`
    block_size: int

    @property
    def first_token(self) -> int:
        return self.first_block * self.block_size

    @property
    def end_token(self) -> int:
        return (self.first_block + len(self.blocks)) * self.block_size

    def rows_of(self, index: int, block_size: int) -> "Iterator[Rows]":
        """Where the tokens of block `index` of a peer go that has `block_size` in each."""
        start = index * block_size
        token = max(start, self.first_token)
        end = min(start + block_size, self.end_token)
        while token < end:
            place, row = divmod(token - self.first_token, self.block_size)
            count = min(self.block_size - row, end - token)
            yield Rows(place=place, source=token - start, target=row, count=count)
            token += count

    def around(self, indices: Sequence[int], block_size: int) -> "Landing":
        """Only the blocks that these of a peer have tokens for."""
        if not indices:
            return replace(self, blocks=())
        first = max(min(indices) * block_size // self.block_size, self.first_block)
        end = num_blocks_for((max(indices) + 1) * block_size, self.block_size)
        part = slice(first - self.first_block, max(0, end - self.first_block))
        return replace(self, blocks=self.blocks[part], first_block=first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Tokens that follow one another in a block of the peer's and in one of ours."""

    place: int  # of our block, in its `Landing`
    source: int  # the first one's row there
    target: int  # and here
    count: int
