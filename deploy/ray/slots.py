"""One process of a deployment through all its lives on Ray nodes."""

import time
from dataclasses import dataclass

from deploy.processes import ProcessRole
from deploy.ray.fork_servers import ForkServers
from deploy.ray.hosted import HostedProcess, Reservation
from deploy.ray.placing import Need, RayNode
from pdserve.config.processes import RouterSettings, WorkerSettings
from pdserve.domain.addresses import is_loopback


@dataclass(slots=True, eq=False, kw_only=True)
class Slot:
    """What stays when the process is replaced, and the life it has now."""

    role: ProcessRole
    settings: RouterSettings | WorkerSettings
    need: Need
    fork_servers: ForkServers
    hosted: HostedProcess | None = None
    serving_since_s: float | None = None  # by time.monotonic(); None: it does not serve

    @property
    def name(self) -> str:
        return self.need.name

    @property
    def num_blocks(self) -> int:
        """KV blocks; none in a router, nor known of a worker whose GPU decides."""
        if not isinstance(self.settings, WorkerSettings):
            return 0
        return self.settings.engine.planned_num_blocks or 0

    @property
    def num_ranks(self) -> int:
        return self.settings.engine.num_ranks if isinstance(self.settings, WorkerSettings) else 1

    @property
    def can_fork(self) -> bool:
        """Whether it imports torch, and no CUDA with it, which cannot be forked."""
        if not isinstance(self.settings, WorkerSettings):
            return False
        engine = self.settings.engine
        return engine.engine == "torch" and engine.device == "cpu"

    async def reserve(self, node: RayNode) -> None:
        """Take the node's resources for a new life; raises `ClusterFailed`."""
        reservation = await Reservation.take(self.need, node)
        self.hosted = HostedProcess(reservation)
        if self.can_fork:
            self.fork_servers.prepare(node)

    async def launch(self, within_s: float) -> None:
        """Start the process where it was reserved; raises `ClusterFailed`."""
        hosted = self.hosted
        assert hosted is not None, f"{self.name} has no place"
        await hosted.open()
        server = ""
        if self.can_fork:
            server = await hosted.ask(self.fork_servers.on(hosted.node), within_s, "cannot fork")
        settings = self._settings_on(hosted.host)
        await hosted.start(self.role, settings, within_s, fork_server=server)
        self.serving_since_s = time.monotonic()

    async def close(self, within_s: float, *, keeps_log: bool = True) -> None:
        """End this life, if there is one; it never raises."""
        self.serving_since_s = None
        hosted, self.hosted = self.hosted, None
        if hosted is not None:
            await hosted.close(within_s, keeps_log=keeps_log)

    def _settings_on(self, host: str) -> RouterSettings | WorkerSettings:
        """For a node whose address is `host`; a router's own choice of address stands."""
        if self.role == "router" and not is_loopback(self.settings.host):
            return self.settings
        update = {"host": host, "insecure": self.settings.insecure or not is_loopback(host)}
        return self.settings.model_copy(update=update)
