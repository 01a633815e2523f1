"""What a simulation is given and what it gives back."""

from collections.abc import Set
from dataclasses import dataclass, field, fields
from enum import StrEnum

import numpy as np
from pydantic import Field

from pdserve.config.base import Settings
from pdserve.config.processes import DEFAULT_BLOCK_SIZE, POLICY, BlockSize, SloClass, SloName
from pdserve.domain.pair_cost import PolicyName
from pdserve.domain.waiting import QueueOrder
from placement.simulation.timing import DistserveTiming, SplitwiseTiming, StepTiming
from placement.simulation.trace import Floats, Ints, Times


class Rules(StrEnum):
    """Whose queues, batches and dispatch are simulated."""

    PDSERVE = "pdserve"
    DISTSERVE = "distserve"
    SPLITWISE = "splitwise"


class PoolRole(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


def can_serve(roles: Set[PoolRole]) -> bool:
    """Whether pools of these roles have a reader and a writer for every request.

    Prefill and decode workers need each other, since colocated ones take prompts from nobody and
    hand none on.
    """
    return {PoolRole.PREFILL, PoolRole.DECODE} <= roles or roles == {PoolRole.COLOCATED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What KV travels over; one such link leaves each prefill instance and one enters each decode.

    Transfers on a link follow one another.
    """

    bytes_per_s: float = 25e9
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Instances that are alike; rules distserve and splitwise ignore KV, link and prompt times."""

    role: PoolRole
    replicas: int
    timing: DistserveTiming | SplitwiseTiming | StepTiming
    tp: int = 1
    pp: int = 1
    gpu: str = ""
    kv_tokens: int = 0  # tokens that the KV memory of one instance holds; 0: no limit
    kv_bytes_per_token: float = 0.0
    link: Link = Link()
    prompt_s: float = 0.0  # host time of a request before its first step, device or not
    prompt_token_s: float = 0.0  # and of each token of its prompt
    beside: float = 1.0  # time of a step while all instances of the other role compute / alone
    beside_answer: float = 0.0  # more, for each answer after the first in a decode instance
    wake_s: float = 0.0  # what the first step after a pause takes longer
    stolen_s: float = 0.0  # that a new request takes from the answers that are decoded

    @property
    def num_gpus(self) -> int:
        return self.replicas * self.tp * self.pp


class TrafficClass(SloClass):
    """A class, and the share of requests that are of it."""

    name: SloName = "all"
    share: float = Field(1.0, gt=0)


class Scheduler(StrEnum):
    """Splitwise's schedulers."""

    MIXED_POOL = "mixed_pool"
    TOKEN_JSQ = "token_jsq"
    KV_JSQ = "kv_jsq"
    KV_TOKEN_JSQ = "kv_token_jsq"


class SplitwiseOptions(Settings):
    """Settings of rules splitwise, by the names of the reference."""

    scheduler: Scheduler | None = Field(
        None, description="mixed_pool; token_jsq where all pools are colocated"
    )
    max_batch_size: int = Field(512, ge=1)
    max_batch_tokens: int = Field(2048, ge=1)
    max_preemptions: int = Field(4, ge=0)
    prompt_max_pending_batch_tokens: int = Field(8192, ge=0)
    transfer_gib_per_s: float = Field(200.0, gt=0)


class PdserveOptions(Settings):
    """Limits and policies of our own router and workers (rules pdserve)."""

    max_step_tokens: int = Field(512, ge=1, le=1_000_000)  # prompt tokens in one prefill step
    max_num_requests: int = Field(64, ge=1, le=100_000)  # decoded at once by one instance
    block_size: BlockSize = DEFAULT_BLOCK_SIZE
    max_tokens_factor: float = Field(1.0, ge=1, description="max_tokens asked / tokens made")
    handoff_s: float = Field(0.002, ge=0)  # messages between router and workers, part of TTFT
    busy_handoff_s: float = Field(0.0, ge=0)  # added to it while the decode instance is in a step
    answer_scatter: float = Field(0.0, ge=0, le=2)  # relative deviation of TPOT
    step_scatter: float = Field(0.0, ge=0, le=2)  # and of each step, which long answers level out
    policy: PolicyName = Field("least_total_time", description=POLICY)
    prefill_order: QueueOrder = "fcfs"
    prefix_cache_tokens: int = Field(0, ge=0)  # kept by each instance that reads prompts; 0: off
    max_num_waiting: int = Field(0, ge=0)  # without a first token in the cluster; 0: no limit
    max_wait_s: float = Field(0.0, ge=0)  # predicted wait at which a request is refused; 0: off


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """One cluster under one set of rules.

    `rate` scales the workload's unit gaps; None takes its arrival times as they stand.
    `concurrency` ignores both: so many requests are always under way.
    """

    pools: tuple[Pool, ...]
    rules: Rules = Rules.PDSERVE
    slo: tuple[TrafficClass, ...] = ()
    rate: float | None = None
    concurrency: int | None = None
    pdserve: PdserveOptions = field(default_factory=PdserveOptions)
    splitwise: SplitwiseOptions = field(default_factory=SplitwiseOptions)

    @property
    def promises_s(self) -> Floats:
        """Of the first token, by class; of none an infinite one."""
        return np.array([item.ttft_s for item in self.slo] or [np.inf])

    @property
    def num_gpus(self) -> int:
        return sum(pool.num_gpus for pool in self.pools)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult(Times):
    """Per request, in the workload's order; a refused one has infinite times and no instance.

    Instances are numbered through the pools in the order in which these are given; in a colocated
    pool `prefill` and `decode` are the same number. A request that never decodes has `decode` -1.
    """

    class_index: Ints  # per request, into the SLO classes

    @classmethod
    def of(cls, times: Times, class_index: Ints) -> "SimulationResult":
        plain = {each.name: getattr(times, each.name) for each in fields(times)}
        return cls(**plain, class_index=class_index)

    @property
    def end_s(self) -> float:
        """When the last request ended, on the clock of `arrival_s`."""
        finished = (self.arrival_s + self.e2e_s)[np.isfinite(self.e2e_s)]
        return float(finished.max()) if len(finished) else 0.0
