"""Channels that notice a dead or stopped server within three seconds."""

from collections.abc import Sequence

import grpc

from pdserve.rpc.channels import DIRECT

KEEPALIVE_MS = 1000
KEEPALIVE_TIMEOUT_MS = 1900
"""Long enough for a router that a busy machine keeps waiting."""

MAX_MESSAGE_BYTES = 16 * 2**20
"""Of an answer with log-probabilities of many tokens; the server bounds requests on its own."""

OPTIONS: Sequence[tuple[str, int | str]] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # finds a stopped process, not only a cut
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),  # retries belong to the router, and to callers who ask for them
    # Channels of one process share no connection, and no back-off after a failed one.
    ("grpc.use_local_subchannel_pool", 1),
    *DIRECT,
)


def open_channel(address: str) -> grpc.aio.Channel:
    """A plaintext channel to host:port; connects with the first call."""
    return grpc.aio.insecure_channel(address, options=OPTIONS)
