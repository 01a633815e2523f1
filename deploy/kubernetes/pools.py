"""Workers that are alike become one set of pods."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.deployment import PlacedWorker
from pdserve.config.processes import WorkerSettings
from pdserve.domain.messages import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """`replicas` workers with the same settings on the same kind of node."""

    name: str
    role: Role
    settings: WorkerSettings  # of its first worker
    replicas: int
    gpu: str
    num_gpus: int
    gpus_per_node: int
    nodes: tuple[tuple[str, int], ...]  # the plan's nodes, and workers on each

    @property
    def is_multi_node(self) -> bool:
        return self.num_gpus > self.gpus_per_node > 0

    @property
    def num_pods(self) -> int:
        """Pods of one worker: one on each node that it spans, with equally many ranks each."""
        if not self.is_multi_node:
            return 1
        least = -(-self.num_gpus // self.gpus_per_node)
        return next(num for num in range(least, self.num_gpus + 1) if self.num_gpus % num == 0)

    @property
    def ranks_per_pod(self) -> int:
        return self.settings.engine.num_ranks // self.num_pods

    @property
    def thread_env(self) -> dict[str, str]:
        """Environment variables that say how many threads compute."""
        threads = "4" if self.num_gpus else "1"
        return {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}

    @property
    def gpus_per_pod(self) -> int:
        return self.num_gpus // self.num_pods


def pools_of(workers: Sequence[PlacedWorker]) -> tuple[Pool, ...]:
    """Group by everything but name, place and cores; a role's only pool has the role's name."""
    groups: dict[tuple[str, ...], list[PlacedWorker]] = {}
    for worker in workers:
        alike = worker.settings.model_copy(update={"worker_id": "any", "cpus": (), "port": 0})
        alike = alike.model_copy(update={"metrics_port": 0})
        key = (str(worker.settings.role), worker.gpu, str(worker.num_gpus), alike.model_dump_json())
        groups.setdefault(key, []).append(worker)
    roles = Counter(key[0] for key in groups)
    taken: Counter[str] = Counter()
    pools = []
    for (role, *_), members in groups.items():
        name = role if roles[role] == 1 else _long_name(members[0])
        taken[name] += 1
        pools.append(_pool(name if taken[name] == 1 else f"{name}-{taken[name]}", members))
    return tuple(pools)


def _long_name(worker: PlacedWorker) -> str:
    engine = worker.settings.engine
    cut = f"tp{engine.tp}" + (f"pp{engine.pp}" if engine.pp > 1 else "")
    kind = worker.gpu or engine.device
    gpu = "".join(char if char.isalnum() else "-" for char in kind.lower())
    return f"{worker.settings.role}-{gpu}-{cut}"


def _pool(name: str, members: Sequence[PlacedWorker]) -> Pool:
    first = members[0]
    nodes = Counter(worker.node for worker in members if worker.node)
    return Pool(
        name=name,
        role=first.settings.role,
        settings=first.settings,
        replicas=len(members),
        gpu=first.gpu,
        # The timed engine computes nothing: it runs wherever there is a core.
        num_gpus=first.num_gpus if first.computes_on_gpus else 0,
        gpus_per_node=first.gpus_per_node,
        nodes=tuple(sorted(nodes.items())),
    )
