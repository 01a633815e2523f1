"""A whole cluster as processes of this machine."""

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy.backend import ClusterEvent, ProcessRow, Report
from deploy.deployment import Deployment, deployment_of_cluster
from deploy.log_dir import LogDir
from deploy.preflight import check_deployment
from deploy.processes import LocalProcess, Ready, describe_exit
from pdserve.cli.problems import ClusterFailed
from pdserve.client.admin import AdminClient
from pdserve.client.faults import ClusterUnreachable
from pdserve.config.cluster import ClusterSettings
from pdserve.config.processes import WorkerSettings
from pdserve.domain.errors import PdserveError

KILL_GRACE_S = 5.0
"""A process that takes this much longer to drain than its own limit is killed."""
REGISTERED_POLL_S = 0.1


class LocalCluster:
    """A router and its workers, owned by an `async with` block.

        async with LocalCluster.start(settings) as cluster:
            client = InferenceClient(cluster.public_address)

    Leaving the block drains router and workers; leaving it by an exception kills them. Either way
    no process is left, nor would one be if this process were killed.
    """

    def __init__(self, deployment: Deployment, report: Report) -> None:
        self.deployment = deployment
        self.processes: list[LocalProcess] = []
        self._logs: LogDir | None = None
        self._report = report
        self._watchers: list[asyncio.Task[None]] = []
        self._exits: asyncio.Queue[tuple[LocalProcess, int]] = asyncio.Queue()

    @classmethod
    def start(
        cls, what: Deployment | ClusterSettings, *, report: Report = lambda text: None
    ) -> Self:
        """A cluster that starts when its `async with` block is entered.

        Entering raises `LocalFault` for what can be known beforehand and `ClusterFailed` for a
        process that does not start. `report` hears of each step.
        """
        if isinstance(what, ClusterSettings):
            what = deployment_of_cluster(what)
        return cls(what, report)

    @property
    def router(self) -> LocalProcess:
        return self.processes[0]

    @property
    def workers(self) -> Sequence[LocalProcess]:
        return self.processes[1:]

    @property
    def public_address(self) -> str:
        return _ready(self.router).address

    @property
    def internal_address(self) -> str:
        return _ready(self.router).internal_address

    def process(self, name: str) -> LocalProcess:
        """The process called `name`: router, prefill-0, decode-1, ..."""
        return next(process for process in self.processes if process.name == name)

    @property
    def log_dir(self) -> Path:
        assert self._logs is not None, "the cluster was not started"
        return self._logs.path

    @property
    def rows(self) -> Sequence[ProcessRow]:
        return [
            ProcessRow(
                name=each.name,
                role=each.role,
                pid=each.pid,
                address=each.ready.internal_address if each.ready else "",
                num_blocks=each.num_blocks,
                metrics_address=each.ready.metrics_address if each.ready else "",
            )
            for each in self.processes
        ]

    @property
    def num_serving(self) -> int:
        return sum(process.ready is not None for process in self.processes)

    async def __aenter__(self) -> Self:
        check_deployment(self.deployment)
        self._logs = LogDir.open(self.deployment.log_dir)
        try:
            async with asyncio.timeout(self.deployment.start_s):
                await self._start_all()
        except TimeoutError:
            message = self._late_message()
            await self._kill_all()
            raise ClusterFailed(message) from None
        except BaseException:
            await self._kill_all()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                await self.drain()
        finally:
            await self._kill_all()
            if error is None:
                assert self._logs is not None
                self._logs.remove()

    async def next_event(self) -> ClusterEvent:
        """The next end of a process; the cluster lives on while a decode worker does."""
        process, code = await self._exits.get()
        happened = f"{process.name} {describe_exit(code)}"
        log = f"the end of {process.log_path}:\n{process.last_words()}"
        if process.role == "router":
            return ClusterEvent(f"{happened}; the cluster is down; {log}", is_fatal=True)
        if not any(each.role == "decode" and each.is_running for each in self.workers):
            return ClusterEvent(f"{happened}; no decode worker is left; {log}", is_fatal=True)
        return ClusterEvent(f"{happened}; the cluster goes on without it; {log}")

    async def drain(self) -> None:
        """Let requests finish: first the router, then the workers; kill what takes too long."""
        await self._stop([self.router])
        await self._stop(self.workers)

    def kill(self) -> None:
        """End every process at once; `async with` still waits for their ends."""
        for process in self.processes:
            process.signal(signal.SIGKILL)

    async def _start_all(self) -> None:
        # The router goes first: workers are told its address, which may be picked by the system.
        router = LocalProcess(
            "router", "router", self.deployment.router, self.log_dir / "router.log"
        )
        await self._start(router)
        workers = [self._worker_process(each.settings) for each in self.deployment.workers]
        self.processes += workers
        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in workers:
                    tasks.create_task(self._start(worker))
        except ExceptionGroup as group:
            raise _first_error(group) from None
        await self._wait_for_registration()

    def _worker_process(self, settings: WorkerSettings) -> LocalProcess:
        told = settings.model_copy(update={"routers": (self.internal_address,)})
        log_path = self.log_dir / f"{told.worker_id}.log"
        return LocalProcess(told.worker_id, told.role, told, log_path)

    async def _start(self, process: LocalProcess) -> None:
        if process not in self.processes:
            self.processes.append(process)
        self._report(f"starting {process.name}")
        ready = await process.start()
        self._watchers.append(asyncio.create_task(self._watch(process)))
        self._report(f"{process.name} serves at {ready.address}")

    async def _watch(self, process: LocalProcess) -> None:
        self._exits.put_nowait((process, await process.watch()))

    async def _wait_for_registration(self) -> None:
        """Until the router has all workers; raises `ClusterFailed` where a process ends first."""
        self._report("waiting for the router to see all workers")
        seen = asyncio.create_task(self._poll_router())
        ended = asyncio.create_task(self._exits.get())
        try:
            await asyncio.wait({seen, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                process, code = ended.result()
                raise ClusterFailed(
                    f"{process.name} {describe_exit(code)} while the cluster started; the end of "
                    f"{process.log_path}:\n{process.last_words()}"
                )
            await seen
        finally:
            for task in (seen, ended):
                task.cancel()
            await asyncio.gather(seen, ended, return_exceptions=True)

    async def _poll_router(self) -> None:
        expected = {process.name for process in self.workers}
        async with AdminClient(self.internal_address) as admin:
            while True:
                with contextlib.suppress(ClusterUnreachable):
                    state = await admin.cluster_state()
                    alive = [each for each in state.workers if each.health == "alive"]
                    if expected <= {str(worker.hello.worker_id) for worker in alive}:
                        return
                await asyncio.sleep(REGISTERED_POLL_S)

    async def _stop(self, processes: Sequence[LocalProcess]) -> None:
        """SIGTERM, wait for the drain, then SIGKILL what is left."""
        for process in processes:
            process.signal(signal.SIGTERM)
        grace_s = self.deployment.drain_s + KILL_GRACE_S
        running = [asyncio.create_task(process.wait()) for process in processes]
        if not running:
            return
        try:
            await asyncio.wait(running, timeout=grace_s)
            for process in processes:
                process.signal(signal.SIGKILL)
            await asyncio.wait(running)
        finally:
            for task in running:
                task.cancel()

    async def _kill_all(self) -> None:
        self.kill()
        ends = [process.wait() for process in self.processes]
        # A second Ctrl-C must not leave zombies behind: they are dead already, this is brief.
        await asyncio.shield(asyncio.gather(*ends, *self._watchers))

    def _late_message(self) -> str:
        late = [process for process in self.processes if process.ready is None]
        limit = f"{self.deployment.start_s:g} s (start_s)"
        if not late:
            return f"the router did not see all workers within {limit}; logs in {self.log_dir}"
        words = "\n".join(f"  {each.name}:\n{each.last_words()}" for each in late)
        names = ", ".join(each.name for each in late)
        return f"{names} did not serve within {limit}; logs in {self.log_dir}\n{words}"


def _ready(process: LocalProcess) -> Ready:
    assert process.ready is not None, f"{process.name} does not serve yet"
    return process.ready


def _first_error(group: ExceptionGroup[Exception]) -> Exception:
    """The error to show: one of ours before an unexpected one."""
    errors = [error for error in group.exceptions if isinstance(error, PdserveError)]
    return errors[0] if errors else group.exceptions[0]
