"""Which prefix blocks an instance keeps: least recently used goes first.

A row is a ring of blocks by age, links both ways (0: to the newer, 1: to the older). The last entry
is the ring's start: its older neighbour is the newest block. A block that is not kept has NONE.
"""

from placement.simulation import pdserve_state as at
from placement.simulation.compiled import compiled
from placement.simulation.pdserve_state import NONE, Cluster

NEWER, OLDER = 0, 1


@compiled
def cached_tokens(c: Cluster, instance: int, request: int) -> int:
    """Tokens of the longest kept prefix; at least the last token is always read."""
    if c.scalars[at.CACHE_BLOCKS] == 0:
        return 0
    row, count = c.cache[instance], 0
    for position in range(c.prefix_starts[request], c.prefix_starts[request + 1]):
        if row[NEWER, c.prefix[position]] == NONE:
            break
        count += 1
    return int(min(count * c.scalars[at.PREFIX_BLOCK], c.requests[request, at.PROMPT] - 1))


@compiled
def keep_prefix(c: Cluster, instance: int, request: int) -> None:
    """The prompt's blocks become the newest, its first block the newest of all."""
    limit = c.scalars[at.CACHE_BLOCKS]
    if limit == 0:
        return
    row, start = c.cache[instance], c.cache.shape[2] - 1
    for position in range(c.prefix_starts[request + 1] - 1, c.prefix_starts[request] - 1, -1):
        block = c.prefix[position]
        if row[NEWER, block] == NONE:
            c.instances[instance, at.NUM_CACHED] += 1
        else:
            row[OLDER, row[NEWER, block]] = row[OLDER, block]
            row[NEWER, row[OLDER, block]] = row[NEWER, block]
        newest = row[OLDER, start]
        row[OLDER, block], row[NEWER, block] = newest, start
        row[NEWER, newest] = block
        row[OLDER, start] = block
    while c.instances[instance, at.NUM_CACHED] > limit:
        oldest = row[NEWER, start]
        row[NEWER, start] = row[NEWER, oldest]
        row[OLDER, row[NEWER, oldest]] = start
        row[NEWER, oldest] = NONE
        c.instances[instance, at.NUM_CACHED] -= 1
