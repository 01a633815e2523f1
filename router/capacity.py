"""Which workers can hold a request at all, however idle they are.

A request that no registered decode worker can hold is refused for good; among those that can, and
the prefill workers that can hold its prompt, `router.policy` chooses. A decode worker that can
hold the answer can read the prompt, too: so the memory of prefill workers refuses nothing.
"""

from collections.abc import Iterable

from pdserve.domain.messages import WorkerHello
from router.cluster_view import RequestShape


def can_write(decode: WorkerHello, shape: RequestShape) -> bool:
    """The decode worker has room for the prompt and the longest answer."""
    num_tokens = shape.num_tokens
    # The KV of the last token is never needed.
    return num_tokens <= decode.max_context_tokens and num_tokens <= max_kv_tokens(decode) + 1


def can_read(reader: WorkerHello, shape: RequestShape) -> bool:
    """The prefill worker has room for the prompt."""
    num_tokens = shape.num_prompt_tokens
    return num_tokens <= reader.max_context_tokens and num_tokens <= max_kv_tokens(reader)


def roomiest(decode: Iterable[WorkerHello]) -> WorkerHello:
    """The decode worker that holds what any of them can hold."""
    return max(decode, key=lambda hello: min(hello.max_context_tokens, max_kv_tokens(hello) + 1))


def max_kv_tokens(hello: WorkerHello) -> int:
    """Positions whose KV the worker has room for."""
    return hello.num_blocks * hello.block_size
