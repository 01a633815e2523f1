"""Which workers there can be: every cut of the model on every GPU type, and why others cannot."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pdserve.domain.errors import LocalFault
from placement.fitted_profile import FittedProfile
from placement.hardware import Gpu, find_gpu, load_gpus, network_link, node_link
from placement.plan_inputs import NodeGroup, PlanInputs
from placement.profiles import (
    DistserveProfile,
    SplitwiseProfile,
    distserve_kv_bytes_per_token,
    load_fitted,
    load_profile,
)
from placement.search.designs import Worker
from placement.simulation.timing import StepTiming
from placement.simulation.values import Link, Pool, PoolRole, Rules

SPLITWISE_GPUS = {  # USD and watts (relative) of one GPU: rule 8 of Splitwise's MODEL.md
    "a100-80gb": (2.21, 24.8),
    "h100-80gb": (4.76, 44.0),
    "h100-80gb-pcap": (4.76, 30.8),
}
MAX_BATCH = 256  # decoded at once by one worker, at most
PROFILE_ERROR = 0.05
ANY_BYTES_PER_S = 1e15
"""A fitted profile has the KV link in it, wherever the workers run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """All nodes of one GPU type."""

    gpu: str
    nodes: int
    gpus_per_node: int
    usd_per_hour: float  # of one GPU
    watts: float
    node_bytes_per_s: float  # one GPU to its node
    network_bytes_per_s: float  # one GPU to other nodes

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthFacts:
    """What workers are sized for."""

    mean_prompt: float
    mean_context: float  # half of the answer made
    max_prompt: int
    max_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Workers in order, and what was refused with its reason."""

    workers: tuple[Worker, ...]
    rejected: tuple[tuple[str, str], ...]


def resolve_fleets(inputs: PlanInputs) -> tuple[Fleet, ...]:
    """Nodes with prices and links; raises `LocalFault` with the nearest name of a GPU."""
    gpus = _known_gpus(inputs)
    fleets: dict[str, Fleet] = {}
    for group in inputs.cluster.nodes:
        fleet = _fleet(inputs, group, gpus)
        if fleet.gpu in fleets:
            raise LocalFault(f"cluster.nodes: {fleet.gpu} is listed twice; give one line a type")
        fleets[fleet.gpu] = fleet
    return tuple(fleets.values())


def _known_gpus(inputs: PlanInputs) -> dict[str, Gpu]:
    path = inputs.cluster.gpus_file
    return load_gpus(Path(path) if path is not None else None)


def _fleet(inputs: PlanInputs, group: NodeGroup, gpus: dict[str, Gpu]) -> Fleet:
    network = inputs.cluster.network_gb_per_s
    fitted = fitted_of(inputs)
    if fitted is not None:
        return _profiled_fleet(inputs, group, fitted)
    if inputs.rules is Rules.SPLITWISE or _is_splitwise(inputs):
        from placement.profiles import HARDWARE_ALIASES

        name = HARDWARE_ALIASES.get(group.gpu.lower(), group.gpu.lower())
        usd, watts = SPLITWISE_GPUS.get(name, (0.0, 0.0))
        link = 200 * 2**30 / 8
        fleet = Fleet(
            gpu=name,
            nodes=group.nodes,
            gpus_per_node=group.gpus_per_node or 8,
            usd_per_hour=group.usd_per_hour or usd,
            watts=group.watts or watts,
            node_bytes_per_s=link,
            network_bytes_per_s=network * 1e9 if network else link,
        )
    else:
        gpu = find_gpu(group.gpu, gpus)
        fleet = Fleet(
            gpu=gpu.name,
            nodes=group.nodes,
            gpus_per_node=group.gpus_per_node or gpu.gpus_per_node,
            usd_per_hour=group.usd_per_hour or gpu.usd_per_hour or 0.0,
            watts=group.watts or gpu.tdp_w,
            node_bytes_per_s=node_link(gpu).bytes_per_s,
            network_bytes_per_s=network * 1e9 if network else network_link(gpu).bytes_per_s,
        )
    if inputs.objective.goal == "cost" and fleet.usd_per_hour == 0:
        raise LocalFault(f"cluster.nodes: {fleet.gpu} has no price; give usd_per_hour")
    return fleet


def _profiled_fleet(inputs: PlanInputs, group: NodeGroup, fitted: FittedProfile) -> Fleet:
    if group.gpu != fitted.gpu:
        raise LocalFault(
            f"cluster.nodes: gpu {group.gpu!r}: the profile was measured on {fitted.gpu!r}; "
            "give that name, or another profile"
        )
    if inputs.objective.goal == "cost" and group.usd_per_hour is None:
        raise LocalFault(f"cluster.nodes: {fitted.gpu} has no price; give usd_per_hour")
    if inputs.objective.goal == "power" and group.watts is None:
        raise LocalFault(f"cluster.nodes: {fitted.gpu}: its power is not known; give watts")
    return Fleet(
        gpu=fitted.gpu,
        nodes=group.nodes,
        gpus_per_node=group.gpus_per_node or 1,
        usd_per_hour=group.usd_per_hour or 0.0,
        watts=group.watts or 0.0,
        node_bytes_per_s=ANY_BYTES_PER_S,
        network_bytes_per_s=ANY_BYTES_PER_S,
    )


def fitted_of(inputs: PlanInputs) -> FittedProfile | None:
    """What `pdserve profile` found out, where the plan is made from that."""
    latency = inputs.latency
    if latency is None or inputs.rules is not Rules.PDSERVE:
        return None
    return load_fitted(latency.profile, latency.model)


def _is_splitwise(inputs: PlanInputs) -> bool:
    return bool(
        inputs.latency
        and inputs.latency.profile
        and isinstance(load_profile(inputs.latency.profile), SplitwiseProfile)
    )


def find_workers(inputs: PlanInputs, fleets: tuple[Fleet, ...], facts: LengthFacts) -> Found:
    """Every worker that the cluster can hold; raises `LocalFault` where there is none."""
    fitted = fitted_of(inputs)
    if fitted is not None:
        return _profiled_workers(inputs, fleets[0], fitted, facts)
    workers: list[Worker] = []
    rejected: list[tuple[str, str]] = []
    is_one_node = len(fleets) == 1 and fleets[0].nodes == 1
    for fleet in fleets:
        for tp, pp, ep in _cuts(inputs, fleet):
            name = f"{fleet.gpu} TP{tp}" + (f" PP{pp}" if pp > 1 else "")
            try:
                base = _base_worker(inputs, fleet, (tp, pp, ep), facts, is_one_node=is_one_node)
            except LocalFault as error:
                rejected.append((name, error.message))
                continue
            problem = _memory_problem(base, facts, inputs.rules)
            if problem:
                rejected.append((name, problem))
                continue
            workers += [base.with_role(role) for role in _roles(inputs)]
    if not workers:
        sizes = ", ".join(f"{f.num_gpus} {f.gpu}, {f.gpus_per_node} a node" for f in fleets)
        reasons = "; ".join(f"{name}: {why}" for name, why in rejected)
        reasons = reasons or f"no cut of search.tp and search.pp fits {sizes}"
        raise LocalFault(f"{inputs.model} fits no worker of this cluster: {reasons}")
    return Found(workers=tuple(workers), rejected=tuple(rejected))


def _profiled_workers(
    inputs: PlanInputs, fleet: Fleet, fitted: FittedProfile, facts: LengthFacts
) -> Found:
    """The two kinds of worker that were measured; raises `LocalFault` where they cannot serve."""
    if not inputs.search.disaggregated:
        raise LocalFault(
            "search.disaggregated: a profile has prefill and decode workers; colocated ones were "
            "not measured"
        )
    workers = []
    for role in (PoolRole.PREFILL, PoolRole.DECODE):
        source = f"fitted by pdserve profile ({fitted.model})"
        worker = _worker(fleet, 1, fitted.pool(role, 1), source, fitted.relative_error)
        if worker.tp > fleet.gpus_per_node:
            raise LocalFault(
                f"cluster.nodes: {fleet.gpu}: {role} workers were profiled at TP{worker.tp}, and a "
                f"node has gpus_per_node {fleet.gpus_per_node}"
            )
        if problem := _memory_problem(worker, facts, inputs.rules):
            raise LocalFault(f"{role} {fleet.gpu}: {problem}")
        workers.append(worker)
    rejected = []
    if inputs.search.colocated:
        rejected.append((f"colocated {fleet.gpu}", "not measured by pdserve profile"))
    measured = {worker.tp for worker in workers}
    if set(inputs.search.tp) - measured or set(inputs.search.pp) - {1}:
        listed = ", ".join(f"TP{tp}" for tp in sorted(measured))
        rejected.append((f"{fleet.gpu} other than {listed}", "not measured by pdserve profile"))
    return Found(workers=tuple(workers), rejected=tuple(rejected))


def _roles(inputs: PlanInputs) -> list[PoolRole]:
    roles = []
    if inputs.search.disaggregated:
        roles += [PoolRole.PREFILL, PoolRole.DECODE]
    if inputs.search.colocated:
        roles.append(PoolRole.COLOCATED)
    return roles


def _cuts(inputs: PlanInputs, fleet: Fleet) -> Iterator[tuple[int, int, int]]:
    if inputs.rules is Rules.SPLITWISE or _is_splitwise(inputs):
        yield fleet.gpus_per_node, 1, 1
        return
    has_experts = False
    if inputs.latency is None or inputs.latency.profile is None:
        has_experts = _spec(inputs).experts is not None
    for tp in sorted(set(inputs.search.tp)):
        for pp in sorted(set(inputs.search.pp)):
            if tp > fleet.gpus_per_node or tp * pp > fleet.num_gpus:
                continue
            yield tp, pp, 1
            if has_experts and inputs.search.expert_parallel and tp > 1:
                yield tp, pp, tp


def _memory_problem(worker: Worker, facts: LengthFacts, rules: Rules) -> str:
    room = worker.pool.kv_tokens
    needed = facts.max_prompt if rules is Rules.DISTSERVE else facts.max_total
    if room and needed > room:
        return f"KV memory holds {room} tokens, the longest request needs {needed}"
    return ""


def _base_worker(
    inputs: PlanInputs,
    fleet: Fleet,
    cut: tuple[int, int, int],
    facts: LengthFacts,
    *,
    is_one_node: bool,
) -> Worker:
    tp, _, ep = cut
    per_gpu = fleet.node_bytes_per_s if is_one_node else fleet.network_bytes_per_s
    link = Link(bytes_per_s=per_gpu * tp, latency_s=2e-5)
    pool, source, error = _pool(inputs, fleet, cut, facts, link)
    return _worker(fleet, ep, pool, source, error)


def _worker(fleet: Fleet, ep: int, pool: Pool, source: str, relative_error: float) -> Worker:
    return Worker(
        role=pool.role,
        gpu=fleet.gpu,
        tp=pool.tp,
        pp=pool.pp,
        ep=ep,
        pool=pool,
        usd_per_hour=fleet.usd_per_hour * pool.tp * pool.pp,
        watts=fleet.watts * pool.tp * pool.pp,
        source=source,
        relative_error=relative_error,
    )


def _pool(
    inputs: PlanInputs,
    fleet: Fleet,
    cut: tuple[int, int, int],
    facts: LengthFacts,
    link: Link,
) -> tuple[Pool, str, float]:
    tp, pp, _ = cut
    plain = partial(
        Pool, role=PoolRole.COLOCATED, replicas=1, tp=tp, pp=pp, gpu=fleet.gpu, link=link
    )
    latency = inputs.latency
    if latency is None or latency.profile is None:
        return _modelled_pool(inputs, fleet, cut, facts, plain)
    profile = load_profile(latency.profile)
    if isinstance(profile, DistserveProfile):
        timing = profile.timing(latency.model, tp=tp, pp=pp)
        kv_bytes = distserve_kv_bytes_per_token(latency.model)
        pool = plain(timing=timing, kv_tokens=timing.max_num_tokens, kv_bytes_per_token=kv_bytes)
        return pool, f"{latency.profile} (DistServe)", PROFILE_ERROR
    measured = profile.timing(latency.model, hardware=fleet.gpu, tp=tp)
    pool = plain(
        timing=measured,
        kv_tokens=measured.kv_tokens,
        kv_bytes_per_token=measured.kv_bytes_per_token,
    )
    return pool, f"{latency.profile} (Splitwise)", PROFILE_ERROR


def _spec(inputs: PlanInputs):  # type: ignore[no-untyped-def]
    from placement.model_config import load_model, with_quantisation

    spec = load_model(inputs.model)
    return with_quantisation(spec, weights=inputs.weights, kv=inputs.kv)


def _modelled_pool(
    inputs: PlanInputs,
    fleet: Fleet,
    cut: tuple[int, int, int],
    facts: LengthFacts,
    plain: Callable[..., Pool],
) -> tuple[Pool, str, float]:
    from placement.latency import composed_latency, kv_capacity_tokens
    from placement.model_spec import Parallelism

    tp, pp, ep = cut
    spec = _spec(inputs)
    gpu = find_gpu(fleet.gpu, _known_gpus(inputs))
    parallelism = Parallelism(tp=tp, pp=pp, ep=ep)
    room = kv_capacity_tokens(spec, gpu, parallelism)
    if room == 0:
        weights = spec.weight_bytes(parallelism) / 2**30
        raise LocalFault(
            f"weights need {weights:.0f} GiB on each GPU, which has {gpu.memory_gib:.0f} GiB, "
            "a tenth of it and 3.5 GiB kept for the runtime"
        )
    model = composed_latency(spec, gpu, parallelism)
    timing = StepTiming.of_model(
        model,
        max_num_requests=MAX_BATCH,
        prompt_tokens=max(int(facts.mean_prompt), 1),
        context_tokens=max(int(facts.mean_context), 1),
        source=str(model.source),
    )
    pool = plain(timing=timing, kv_tokens=room, kv_bytes_per_token=spec.kv_bytes_per_token())
    return pool, str(model.source), model.relative_error
