"""Which workers can hold a request at all, however idle they are.

A request that no registered decode worker can hold is refused for good; among those that can, and
the prefill workers that can hold its prompt, `router.policy` chooses. A decode worker that can
hold the answer can read the prompt, too: so the memory of prefill workers refuses nothing.
"""

from collections.abc import Iterable

from pdserve.domain.kv_demand import num_blocks_for
from pdserve.domain.messages import WorkerHello
from router.cluster_view import RequestShape


def can_write(decode: WorkerHello, shape: RequestShape) -> bool:
    """The decode worker has room for the prompt and the longest answer."""
    has_blocks = shape.num_blocks(decode.block_size) <= decode.num_blocks
    return has_blocks and shape.num_tokens <= decode.max_context_tokens


def can_read(reader: WorkerHello, shape: RequestShape) -> bool:
    """The prefill worker has room for the prompt."""
    num_blocks = num_blocks_for(shape.num_prompt_tokens, reader.block_size)
    return num_blocks <= reader.num_blocks and shape.num_prompt_tokens <= reader.max_context_tokens


def roomiest(decode: Iterable[WorkerHello]) -> WorkerHello:
    """The decode worker that holds what any of them can hold."""
    return max(decode, key=lambda hello: min(hello.max_context_tokens, max_kv_tokens(hello) + 1))


def max_kv_tokens(hello: WorkerHello) -> int:
    """Positions whose KV the worker has room for."""
    return hello.num_blocks * hello.block_size
