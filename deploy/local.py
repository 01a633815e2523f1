"""A whole cluster as processes of this machine."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from deploy.backend import KILL_GRACE_S, Cluster, ProcessRow, Report, side_by_side
from deploy.backoff import Backoff
from deploy.deployment import Deployment, PlacedWorker, deployment_of_cluster
from deploy.forked import ForkedProcess, ForkServer
from deploy.gpus import assign_gpus, gpu_environment, visible_gpus
from deploy.log_dir import LogDir
from deploy.preflight import check_deployment
from deploy.processes import LocalProcess, Ready, describe_exit, opened_log
from deploy.registration import all_alive
from pdserve.config.cluster import ClusterSettings
from pdserve.config.processes import WorkerSettings
from pdserve.domain.addresses import split_address
from pdserve.domain.errors import LocalFault, PdserveError
from pdserve.worker.parts import running

JOIN_S = 10.0
"""The router has a worker that serves within this time, unless something else is wrong."""
RESTART_S = 120.0
"""A process that does not serve so long after it was started again is tried anew."""


class LocalCluster(Cluster):
    """A router and its workers, owned by an `async with` block.

        async with LocalCluster.start(settings) as cluster:
            client = InferenceClient(cluster.public_address)

    Workers begin as forks of a process that has imported what they need. A process that ends while
    the block runs is started again. Leaving the block drains router and workers; leaving it by an
    exception kills them. Either way no process is left, nor would one be if this process were
    killed.
    """

    def __init__(self, deployment: Deployment, report: Report) -> None:
        super().__init__(deployment, report)
        self.processes: list[LocalProcess] = []
        self._fork_server = ForkServer(engine=_preloaded_engine(deployment))
        self._gpus: Mapping[str, tuple[str, ...]] = {}
        self._ends: dict[LocalProcess, asyncio.Task[int]] = {}  # their exit codes
        self._keepers: list[asyncio.Task[None]] = []

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

    def process(self, name: str) -> LocalProcess:
        """The process called `name`: router, prefill-0, decode-1, ..."""
        return next(process for process in self.processes if process.name == name)

    @property
    def rows(self) -> Sequence[ProcessRow]:
        return [
            ProcessRow(
                name=each.name,
                role=each.role,
                pid=each.pid if each.ready else 0,
                address=each.ready.internal_address if each.ready else "",
                num_blocks=each.num_blocks,
                metrics_address=each.ready.metrics_address if each.ready else "",
                num_ranks=each.num_ranks,
                device=self._device(each),
            )
            for each in self.processes
        ]

    def _device(self, process: LocalProcess) -> str:
        if gpus := self._gpus.get(process.name):
            return f"GPU {','.join(gpus)}"
        settings = process.settings
        cpus = settings.cpus if isinstance(settings, WorkerSettings) else ()
        return f"CPU {_ranges(cpus)}" if cpus else ""

    def _check(self) -> None:
        check_deployment(self.deployment)
        deployment = self.deployment
        self._gpus = assign_gpus(deployment.workers, visible_gpus(), share=deployment.share_gpus)
        num_cpus, num_ranks = len(os.sched_getaffinity(0)), _num_cpu_ranks(deployment)
        if num_ranks > num_cpus:
            self._tell(
                f"note: {num_ranks} ranks compute on {num_cpus} cores: those that share a core "
                "wait for each other in every step"
            )

    async def drain(self) -> None:
        await self._stop_keeping()
        await self._stop([self.router])
        await self._stop(self.workers)

    def kill(self) -> None:
        for process in self.processes:
            process.signal(signal.SIGKILL)

    async def _start_all(self) -> None:
        self._logs = LogDir.open(self.deployment.log_dir)
        # The router goes first: workers are told its address, which may be picked by the system.
        async with running(self._start_forking()) as forking:
            settings = self.deployment.router
            self.processes = [
                LocalProcess("router", "router", settings, self.log_dir / "router.log")
            ]
            ready = await self._start(self.router)
            self.public_address, self.internal_address = ready.address, ready.internal_address
            self.processes += [self._worker(each) for each in self.deployment.workers]
            await forking
        await side_by_side(self._start(worker) for worker in self.workers)
        await self._wait_for_registration(map(self._end_of, self.processes))
        self._keepers = [
            asyncio.create_task(self._keep(place)) for place in range(len(self.processes))
        ]

    async def _start_forking(self) -> None:
        """Without a fork server workers begin as programs: only slower."""
        if not any(_can_fork(each.settings) for each in self.deployment.workers):
            return
        self._report("importing what workers need")
        with opened_log(self.log_dir / "fork-server.log") as log:
            try:
                await self._fork_server.start(log)
            except LocalFault as fault:
                self._report(f"{fault.message}; see {log.name}")

    def _worker(self, worker: PlacedWorker) -> LocalProcess:
        """One process for all ranks of a worker: it forks the others itself."""
        told = worker.settings.model_copy(update={"routers": (self.internal_address,)})
        log_path = self.log_dir / f"{told.worker_id}.log"
        if not _can_fork(told):
            env = gpu_environment(worker, self._gpus.get(worker.name, ()))
            return LocalProcess(told.worker_id, told.role, told, log_path, env=env)
        server = self._fork_server.name
        return ForkedProcess(server, told.worker_id, told.role, told, log_path)

    async def _start(self, process: LocalProcess) -> Ready:
        self._report(f"starting {process.name}")
        ready = await process.start()
        self._ends[process] = asyncio.create_task(process.watch())
        self._report(f"{process.name} serves at {ready.address}")
        return ready

    async def _end_of(self, process: LocalProcess) -> str:
        """How it ended, once it has."""
        await asyncio.wait([self._ends[process]])
        code = self._ends[process].result()
        return (
            f"{process.name} {describe_exit(code)}; the end of {process.log_path}:\n"
            f"{process.last_words()}"
        )

    async def _keep(self, place: int) -> None:
        """One place: lose a life, start the next, until cancelled."""
        backoff, loop = Backoff(), asyncio.get_running_loop()
        while True:
            process, born_s = self.processes[place], loop.time()
            obituary = await self._end_of(process)
            del self._ends[process]
            lost_s = loop.time()
            self._tell(f"{obituary}\nstarting {process.name} again")
            await asyncio.sleep(backoff.after_life(lost_s - born_s))
            ready = await self._revive(place, backoff)
            names = {each.name for each in self.workers} if place == 0 else {process.name}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(JOIN_S):  # the router takes it in a moment later
                    await all_alive(self.internal_address, names)
            gone_s = loop.time() - lost_s
            self._tell(f"{process.name} serves again at {ready.address}, {gone_s:.1f} s later")

    async def _revive(self, place: int, backoff: Backoff) -> Ready:
        """Try until it serves; tell each new reason why it does not."""
        told = ""
        while True:
            process = self._successor(place)
            try:
                async with asyncio.timeout(RESTART_S):
                    return await self._start(process)
            except TimeoutError:
                why = f"{process.name} did not serve within {RESTART_S:g} s"
            except PdserveError as error:
                why = error.message
            process.signal(signal.SIGKILL)
            await process.wait()
            if why != told:
                told = why
                self._tell(f"{why}\ntrying again")
            await asyncio.sleep(backoff.after_failure())

    def _successor(self, place: int) -> LocalProcess:
        """The next life at `place`; a router listens where clients and workers know it."""
        lost = self.processes[place]
        if place > 0:
            self.processes[place] = self._worker(self.deployment.workers[place - 1])
        else:
            ports = {
                "port": split_address(self.public_address)[1],
                "internal_port": split_address(self.internal_address)[1],
            }
            settings = lost.settings.model_copy(update=ports)
            self.processes[place] = LocalProcess("router", "router", settings, lost.log_path)
        return self.processes[place]

    async def _stop_keeping(self) -> None:
        """Nothing is started again any more."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

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

    async def _end_all_now(self, keeps_logs: bool) -> None:
        await self._stop_keeping()
        self.kill()
        await asyncio.gather(*(process.wait() for process in self.processes))
        await asyncio.gather(*self._ends.values())
        await self._fork_server.close()

    def _late_message(self) -> str:
        late = (process for process in self.processes if process.ready is None)
        words = (f"  {each.name}:\n{each.last_words()}" for each in late)
        return "\n".join([super()._late_message(), *words])


def _num_cpu_ranks(deployment: Deployment) -> int:
    """Of workers that have several: their ranks wait for each other."""
    engines = [
        worker.settings.engine
        for worker in deployment.workers
        if worker.settings.engine.engine == "torch" and not worker.computes_on_gpus
    ]
    return sum(engine.num_ranks for engine in engines if engine.num_ranks > 1)


def _ranges(numbers: Sequence[int]) -> str:
    """0-3,8 for 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _can_fork(settings: WorkerSettings) -> bool:
    """What has used a GPU cannot be forked."""
    return settings.engine.device == "cpu"


def _preloaded_engine(deployment: Deployment) -> Literal["torch", "timed"]:
    engines = {worker.settings.engine.engine for worker in deployment.workers}
    return "torch" if "torch" in engines else "timed"
