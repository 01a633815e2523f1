"""Binary heaps in arrays, for kernels.

`push` and `pop` order by (time, sequence number): the order of simpy's queue. `push_int` and
`pop_int` keep plain int64 keys.
"""

import numpy as np
from numpy.typing import NDArray

from placement.simulation.compiled import compiled


@compiled
def push(
    times: NDArray[np.float64],
    sequence: NDArray[np.int64],
    items: NDArray[np.int64],
    size: int,
    time: float,
    number: int,
    item: int,
) -> int:
    """Add one event; returns the new size."""
    position = size
    while position > 0:
        parent = (position - 1) >> 1
        if times[parent] < time or (times[parent] == time and sequence[parent] < number):
            break
        times[position] = times[parent]
        sequence[position] = sequence[parent]
        items[position] = items[parent]
        position = parent
    times[position] = time
    sequence[position] = number
    items[position] = item
    return size + 1


@compiled
def pop(
    times: NDArray[np.float64], sequence: NDArray[np.int64], items: NDArray[np.int64], size: int
) -> int:
    """Drop the first event, which the caller has read at index 0; returns the new size."""
    last = size - 1
    time, number, item = times[last], sequence[last], items[last]
    position = 0
    while True:
        child = 2 * position + 1
        if child >= last:
            break
        right = child + 1
        if right < last and (
            times[right] < times[child]
            or (times[right] == times[child] and sequence[right] < sequence[child])
        ):
            child = right
        if time < times[child] or (time == times[child] and number < sequence[child]):
            break
        times[position] = times[child]
        sequence[position] = sequence[child]
        items[position] = items[child]
        position = child
    times[position] = time
    sequence[position] = number
    items[position] = item
    return last


@compiled
def push_int(heap: NDArray[np.int64], size: int, key: int) -> None:
    """Add `key` to the first `size` entries of `heap`."""
    position = size
    while position > 0:
        parent = (position - 1) >> 1
        if heap[parent] <= key:
            break
        heap[position] = heap[parent]
        position = parent
    heap[position] = key


@compiled
def pop_int(heap: NDArray[np.int64], size: int) -> None:
    """Drop the least of the first `size` keys."""
    last = size - 1
    key = heap[last]
    position = 0
    while True:
        child = 2 * position + 1
        if child >= last:
            break
        if child + 1 < last and heap[child + 1] < heap[child]:
            child += 1
        if key <= heap[child]:
            break
        heap[position] = heap[child]
        position = child
    heap[position] = key
