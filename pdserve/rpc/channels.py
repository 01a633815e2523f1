"""gRPC options of every channel and server of ours."""

import grpc.aio

from pdserve.config.timers import Timers

MAX_PUBLIC_MESSAGE_BYTES = 4 << 20
MAX_INTERNAL_MESSAGE_BYTES = 64 << 20  # a prompt of millions of tokens, or a large cluster's state
MAX_METADATA_BYTES = 16 << 10

DIRECT = (("grpc.enable_http_proxy", 0),)
"""Ours is the address itself: a proxy that `http_proxy` and the like name is for the web."""


def channel_options(timers: Timers) -> list[tuple[str, int]]:
    """Pings that find a dead, partitioned or stopped peer within interval plus timeout.

    Measured with grpcio 1.85: keepalive alone misses a stopped process; `ping_timeout_ms` too
    finds both in 0.8 to 2.0 s.
    """
    return [
        *_options(timers, max_received_bytes=MAX_INTERNAL_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        *DIRECT,
    ]


def server_options(timers: Timers, *, max_message_bytes: int) -> list[tuple[str, int]]:
    """As `channel_options`, for the serving side; pings of clients are welcome."""
    min_interval_ms = int(timers.keepalive_s * 1000) // 4
    return [
        *_options(timers, max_received_bytes=max_message_bytes),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", min_interval_ms),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ]


def _options(timers: Timers, *, max_received_bytes: int) -> list[tuple[str, int]]:
    """What both ends of a channel have."""
    timeout_ms = int(timers.keepalive_timeout_s * 1000)
    return [
        ("grpc.keepalive_time_ms", int(timers.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", max_received_bytes),
        ("grpc.max_send_message_length", MAX_INTERNAL_MESSAGE_BYTES),
    ]


def open_channel(address: str, timers: Timers) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=channel_options(timers))
