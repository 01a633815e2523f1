"""What runs: one router and its workers, the same value for every place that they may run in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pdserve.config.cluster import ClusterSettings
from pdserve.config.processes import RouterSettings, WorkerSettings
from pdserve.domain.messages import Role
from placement.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedWorker:
    """A worker, and what it needs of a machine. Its routers are named by the place it runs in."""

    settings: WorkerSettings
    gpu: str = ""  # a type of `pdserve gpus`; empty: none, it computes on the CPU
    gpus_per_node: int = 0  # of that type, usually
    node: str = ""  # "h200_sxm:0" where the plan puts it; empty: anywhere

    @property
    def name(self) -> str:
        return self.settings.worker_id

    @property
    def computes_on_gpus(self) -> bool:
        engine = self.settings.engine
        return engine.engine == "torch" and engine.device != "cpu"

    @property
    def num_gpus(self) -> int:
        """All its ranks together; 0 without GPUs."""
        return self.settings.engine.num_ranks if self.gpu or self.computes_on_gpus else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A cluster as it will be started, wherever that is."""

    router: RouterSettings
    workers: tuple[PlacedWorker, ...]
    start_s: float = 120.0
    log_dir: str = ""
    share_gpus: bool = False
    plan: Plan | None = None
    notes: tuple[str, ...] = ()  # how it differs from the plan, for people

    def of_role(self, role: Role) -> tuple[PlacedWorker, ...]:
        return tuple(worker for worker in self.workers if worker.settings.role is role)

    @property
    def drain_s(self) -> float:
        return self.router.timers.drain_s

    def pinned_to(self, cpus: Sequence[int]) -> "Deployment":
        """The same with each worker on cores of its own, as far as they go, by its ranks.

        If there are fewer cores than ranks, each role has its share of them, so that reading
        prompts never takes the cores of decoding. Needs two cores or more to do anything.
        """
        by_name: dict[str, tuple[int, ...]] = {}
        pools = [pool for pool in map(self.of_role, Role) if pool]
        weights = [[each.settings.engine.num_ranks for each in pool] for pool in pools]
        for pool, own_weights, share in zip(
            pools, weights, _shares(cpus, list(map(sum, weights))), strict=True
        ):
            own = _shares(share, own_weights)
            for worker, cores in zip(pool, own, strict=True):
                by_name[worker.name] = tuple(cores)
        return replace(
            self,
            workers=tuple(
                replace(
                    worker,
                    settings=worker.settings.model_copy(update={"cpus": by_name[worker.name]}),
                )
                for worker in self.workers
            ),
        )


def deployment_of_cluster(settings: ClusterSettings) -> Deployment:
    """A cluster file's cluster."""
    return Deployment(
        router=settings.router_settings(),
        workers=tuple(PlacedWorker(settings=each) for each in settings.worker_settings("")),
        start_s=settings.start_s,
        log_dir=settings.log_dir,
        share_gpus=settings.share_gpus,
    )


def _shares(cpus: Sequence[int], weights: Sequence[int]) -> list[Sequence[int]]:
    """Cores in proportion to the weights, at least one each; all for all where they are too few.

    Where there are as many cores as the weights together, nobody gets fewer than its weight.
    """
    if len(cpus) < len(weights):
        return [cpus] * len(weights)
    total, shares, first, so_far = sum(weights), [], 0, 0
    for index, weight in enumerate(weights):
        so_far += weight
        num_left = len(weights) - index - 1
        # Halves go up, so that whole steps stay whole: x + n is rounded as x is.
        wanted = (2 * so_far * len(cpus) + total) // (2 * total)
        last = min(max(wanted, first + 1), len(cpus) - num_left)
        shares.append(cpus[first:last])
        first = last
    return shares
