"""Names of things that cross processes."""

from dataclasses import dataclass
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
BlockId = NewType("BlockId", int)
Epoch = NewType("Epoch", int)
"""One life of one process: a nonce drawn when it starts."""

PROTOCOL_VERSION = 3


@dataclass(frozen=True, slots=True, order=True)
class AttemptId:
    """One try at a request; counted by the router from 1."""

    request_id: RequestId
    attempt: int


@dataclass(frozen=True, slots=True, order=True)
class HandoffId:
    """One passage of a prompt's KV from a prefill worker to a decode worker.

    `retry` is counted by the decode worker within an attempt, so that whatever a past passage
    still sends is recognised and dropped.
    """

    request_id: RequestId
    attempt: int
    retry: int
