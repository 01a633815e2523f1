"""What the solver chooses between: kinds of worker, and how many of each."""

from dataclasses import dataclass, replace
from functools import cached_property

from placement.simulation.values import Pool, PoolRole, Scheduler, SimulationConfig, can_serve

ROLE_ORDER = {PoolRole.PREFILL: 0, PoolRole.DECODE: 1, PoolRole.COLOCATED: 2}


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One kind of worker: a role on a GPU type, cut in one way.

    `pool` holds one replica, with its timing, memory and link. Two workers are equal where role,
    GPU and cut are, which within one problem decides everything else.
    """

    role: PoolRole
    gpu: str
    tp: int
    pp: int
    ep: int
    pool: Pool
    usd_per_hour: float  # of all its GPUs
    watts: float
    source: str  # where its step times come from
    relative_error: float  # of one step, as its source states it

    @cached_property
    def key(self) -> tuple[int, str, int, int, int]:
        return (ROLE_ORDER[self.role], self.gpu, self.tp, self.pp, self.ep)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Worker) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp

    @property
    def cut(self) -> str:
        """Such as TP2 or TP4 PP2."""
        text = f"TP{self.tp}"
        if self.pp > 1:
            text += f" PP{self.pp}"
        return text + (f" EP{self.ep}" if self.ep > 1 else "")

    @property
    def label(self) -> str:
        return f"{self.role} {self.gpu} {self.cut}"

    def with_role(self, role: PoolRole) -> "Worker":
        return replace(self, role=role, pool=replace(self.pool, role=role))


Counts = tuple[tuple[Worker, int], ...]


@dataclass(frozen=True, kw_only=True)
class Design:
    """How many of each worker, in order of their keys, and the limits that workers enforce."""

    counts: Counts
    max_step_tokens: int = 512
    max_num_requests: int = 64

    @classmethod
    def of(
        cls,
        counts: dict[Worker, int],
        *,
        max_step_tokens: int = 512,
        max_num_requests: int = 64,
    ) -> "Design":
        """Order the workers; those that are counted 0 times go."""
        ordered = sorted(counts.items(), key=lambda item: item[0].key)
        return cls(
            counts=tuple((worker, count) for worker, count in ordered if count > 0),
            max_step_tokens=max_step_tokens,
            max_num_requests=max_num_requests,
        )

    @cached_property
    def key(self) -> tuple[object, ...]:
        counts = tuple((worker.key, count) for worker, count in self.counts)
        return (counts, self.max_step_tokens, self.max_num_requests)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Design) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def num_gpus(self) -> int:
        return sum(worker.num_gpus * count for worker, count in self.counts)

    @cached_property
    def usd_per_hour(self) -> float:
        return sum(worker.usd_per_hour * count for worker, count in self.counts)

    @cached_property
    def watts(self) -> float:
        return sum(worker.watts * count for worker, count in self.counts)

    @property
    def num_workers(self) -> int:
        return sum(count for _, count in self.counts)

    @property
    def roles(self) -> frozenset[PoolRole]:
        return frozenset(worker.role for worker, _ in self.counts)

    @property
    def is_complete(self) -> bool:
        """Whether it can serve: both phases have somebody."""
        return can_serve(self.roles)

    @property
    def kind(self) -> str:
        """Colocated, disaggregated, or mixed."""
        if self.roles == {PoolRole.COLOCATED}:
            return "colocated"
        return "mixed" if PoolRole.COLOCATED in self.roles else "disaggregated"

    @property
    def label(self) -> str:
        kinds = {worker.gpu for worker, _ in self.counts}
        parts = []
        for worker, count in self.counts:
            gpu = f" {worker.gpu}" if len(kinds) > 1 else ""
            parts.append(f"{count} {worker.role}{gpu} {worker.cut}")
        return " + ".join(parts) or "nothing"

    def side(self, role: PoolRole) -> Counts:
        """The pools of one role."""
        return tuple(item for item in self.counts if item[0].role is role)

    def with_change(self, worker: Worker, change: int) -> "Design":
        """The same with more or fewer of one worker."""
        counts = dict(self.counts)
        counts[worker] = counts.get(worker, 0) + change
        return replace(self, counts=Design.of(counts).counts)

    def gpus_by_type(self) -> dict[str, int]:
        used: dict[str, int] = {}
        for worker, count in self.counts:
            used[worker.gpu] = used.get(worker.gpu, 0) + worker.num_gpus * count
        return used

    def config(self, base: SimulationConfig) -> SimulationConfig:
        """What the simulator is given: `base` with these pools and limits."""
        limits = {
            "max_step_tokens": self.max_step_tokens,
            "max_num_requests": self.max_num_requests,
        }
        alike = {"scheduler": Scheduler.TOKEN_JSQ} if self.kind == "colocated" else None
        return replace(
            base,
            pools=tuple(replace(worker.pool, replicas=count) for worker, count in self.counts),
            pdserve=base.pdserve.model_copy(update=limits),
            splitwise=base.splitwise.model_copy(update=alike),
        )


def gpus_text(num: int) -> str:
    """Such as 1 GPU, 8 GPUs."""
    return f"{num} GPU{'' if abs(num) == 1 else 's'}"


def single_losses(design: Design) -> list[tuple[Worker, Design]]:
    """The design without one worker, for each kind, the smallest pools first.

    One that cannot serve is among them where a pool has a single worker.
    """
    ordered = sorted(design.counts, key=lambda item: (item[1], item[0].key))
    return [(worker, design.with_change(worker, -1)) for worker, _ in ordered]
