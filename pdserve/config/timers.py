"""Every wait of every process, in one place."""

from pydantic import Field

from pdserve.config.base import Settings


class Timers(Settings):
    """Seconds. Failure detection needs heartbeat < suspect < dead."""

    heartbeat_s: float = Field(0.5, gt=0, description="a worker reports its load this often")
    suspect_s: float = Field(1.5, gt=0, description="silent for this long: no new requests")
    dead_s: float = Field(3.0, gt=0, description="silent for this long: given up")
    connect_s: float = Field(2.0, gt=0, description="opening a stream to a peer")
    transfer_idle_s: float = Field(2.0, gt=0, description="a KV read that makes no progress")
    transfer_s: float = Field(30.0, gt=0, description="a KV read in all, if it makes progress")
    transport_retry_s: float = Field(
        30.0, gt=0, description="a KV transport that failed is left alone for this pair"
    )
    lease_s: float = Field(10.0, gt=0, description="offered blocks stay pinned without renewal")
    renew_s: float = Field(3.0, gt=0, description="a decode worker renews its leases this often")
    queue_s: float = Field(10.0, gt=0, description="a request waits in a worker's queue at most")
    request_s: float = Field(600.0, gt=0, description="a request without a deadline gets this one")
    drain_s: float = Field(30.0, gt=0, description="running requests may finish after SIGTERM")
    stuck_s: float = Field(60.0, gt=0, description="one engine step this long: not live any more")
    keepalive_s: float = Field(1.0, gt=0, description="HTTP/2 pings go out this often")
    keepalive_timeout_s: float = Field(
        1.5, gt=0, description="a ping unanswered for this long ends the connection"
    )
