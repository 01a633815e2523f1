"""What probes are told (grpc.health.v1): service "" is readiness, `pdserve.live` is liveness.

Liveness tells stuck from busy. It fails where the engine has been in one step for too long; a
process whose event loop is blocked does not answer at all. A long queue is neither.
"""

from collections.abc import Callable
from typing import Any

from grpc_health.v1 import health, health_pb2

READINESS = ""
LIVENESS = "pdserve.live"

_Status = health_pb2.HealthCheckResponse


class ProcessHealth(health.aio.HealthServicer):  # type: ignore[name-defined,misc]
    """Conditions are looked at when a probe asks. `Watch` follows drains only."""

    def __init__(self) -> None:
        super().__init__()
        self.ready_while: Callable[[], bool] = lambda: True
        self.live_while: Callable[[], bool] = lambda: True

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Status of one service; NOT_FOUND for one that is neither of ours."""
        if request.service == LIVENESS:
            return _reply(self.live_while())
        if request.service == READINESS and not self.ready_while():
            return _reply(False)
        return await super().Check(request, context)

    async def set_ready(self, is_ready: bool) -> None:
        """Off while the process drains, whatever `ready_while` says."""
        await self.set(READINESS, _Status.SERVING if is_ready else _Status.NOT_SERVING)


def _reply(is_good: bool) -> Any:
    return _Status(status=_Status.SERVING if is_good else _Status.NOT_SERVING)
