"""What a worker of a plan asks Ray for: names of resources, and words where they are not there."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from deploy.deployment import Deployment, PlacedWorker
from deploy.ray.placing import Amounts, Need, RayNode, Unfit
from pdserve.domain.errors import LocalFault

ACCELERATOR_SHARE = 0.001
"""Every node has 1 of the type of its GPUs, however many those are: each rank takes a little."""
ACCELERATORS: Mapping[str, str] = {
    "a100_40g_sxm": "A100",
    "a100_pcie": "A100",
    "a100_sxm": "A100",
    "a10g": "A10G",
    "a30": "A30",
    "b200_sxm": "B200",
    "b300_sxm": "B300",
    "gb200": "GB200",
    "gb300": "GB300",
    "h100_nvl": "H100",
    "h100_pcie": "H100",
    "h100_sxm": "H100",
    "h20": "H20",
    "h200_sxm": "H200",
    "l4": "L4",
    "l40s": "L40S",
    "mi250x": "AMD-Instinct-MI250X",
    "mi300x": "AMD-Instinct-MI300X-OAM",
    "mi325x": "AMD-Instinct-MI325X-OAM",
    "mi355x": "AMD-Instinct-MI355X-OAM",
    "rtx_pro_6000_server": "RTX-PRO-6000",
    "v100_sxm": "V100",
}
"""From types of `pdserve gpus` to what Ray calls them; Ray tells no SXM from a PCIe card."""
GIVEN = re.compile(r"([^=:\s]+)=([^:\s]+)(?::([0-9.]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """How a deployment is laid on a Ray cluster."""

    address: str | None = None  # host:port of its GCS; None: RAY_ADDRESS, or the one on this host
    cpus_per_rank: float = 1.0  # of Ray's CPU resource; the router asks for none
    gpu_resources: Mapping[str, Amounts] = field(default_factory=dict)  # by plan GPU, per rank
    shows_logs: bool = False  # every line of the processes' logs as an event, errors aside


def parse_gpu_resources(given: Iterable[str]) -> Mapping[str, Amounts]:
    """`h100_sxm=big_gpu:2` as {"h100_sxm": {"big_gpu": 2}}; raises `LocalFault` otherwise."""
    parsed: dict[str, Amounts] = {}
    for text in given:
        match = GIVEN.fullmatch(text)
        try:
            amount = float(match[3] or 1) if match else 0.0
        except ValueError:
            amount = 0.0
        if match is None or amount <= 0:
            raise LocalFault(
                f"--ray-resource {text}: expected GPU_TYPE=RESOURCE or GPU_TYPE=RESOURCE:AMOUNT, "
                "such as h100_sxm=big_gpu:1"
            )
        parsed[match[1]] = {match[2]: amount}
    return parsed


def needs_of(deployment: Deployment, options: RayOptions) -> tuple[Need, ...]:
    """One for each worker; raises `LocalFault` for a GPU type that Ray has no name for."""
    return tuple(_need(worker, options) for worker in deployment.workers)


def _need(worker: PlacedWorker, options: RayOptions) -> Need:
    engine = worker.settings.engine
    return Need(
        name=worker.name,
        bundle={"CPU": options.cpus_per_rank, **_accelerator(worker, options)},
        num_ranks=engine.tp * engine.pp,
        group=worker.node,
    )


def _accelerator(worker: PlacedWorker, options: RayOptions) -> Amounts:
    """Of one rank."""
    if worker.gpu in options.gpu_resources:
        return options.gpu_resources[worker.gpu]
    device = worker.settings.engine.device
    if device == "cpu":
        return {}
    if ":" in device:
        raise LocalFault(f"device {device}: Ray says which GPU each rank gets: give device: cuda")
    if not worker.gpu:
        return {"GPU": 1} if worker.computes_on_gpus else {}
    if worker.gpu not in ACCELERATORS:
        raise LocalFault(
            f"Ray has no name for GPU type {worker.gpu}: say which resource stands for one with "
            f"--ray-resource {worker.gpu}=RESOURCE"
        )
    return {"GPU": 1, f"accelerator_type:{ACCELERATORS[worker.gpu]}": ACCELERATOR_SHARE}


def explain_unfit(unfit: Unfit, nodes: Sequence[RayNode], gpus: Mapping[str, str]) -> str:
    """What is missing, what would fit, and what to do; `gpus`: each worker's type in the plan."""
    wanted = sorted({name for need in unfit.missing for name in need.bundle})
    unknown = [name for name in wanted if not any(name in node.total for node in nodes)]
    first = unfit.missing[0]
    fits = ", ".join(unfit.placed) or "none"
    names = ", ".join(need.name for need in unfit.missing)
    free = "; ".join(f"{node.label}: {_free(node, wanted)}" for node in nodes) or "no nodes"
    if unknown:
        types = sorted({gpus[need.name] for need in unfit.missing if gpus.get(need.name)})
        of = f" (the plan's {', '.join(types)})" if types else ""
        return (
            f"no node of the Ray cluster has {' or '.join(unknown)}{of}, which {names} "
            f"need{_s(unfit.missing)}; workers that would fit: {fits}; nodes: {_kinds(nodes)}; "
            "plan for what is there, add such nodes, or name another resource with --ray-resource"
        )
    ranks = f" for each of {first.num_ranks} ranks on one node" if first.num_ranks > 1 else ""
    return (
        f"the Ray cluster has no room for {names}: {first.name} needs {_listed(first.bundle)}"
        f"{ranks}; workers that would fit: {fits}; free: {free}; add nodes, stop what uses them "
        "(see `ray status`), or start less of the plan with --scale"
    )


def _listed(amounts: Amounts) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def _free(node: RayNode, names: Sequence[str]) -> str:
    shares = [f"{node.free.get(name, 0):g} of {node.total.get(name, 0):g} {name}" for name in names]
    return ", ".join(shares)


def _kinds(nodes: Sequence[RayNode]) -> str:
    """What each node has that a plan may ask for."""
    kept = [
        {
            name: amount
            for name, amount in node.total.items()
            if not name.startswith(("node:", "object_store_memory", "memory", "bundle"))
        }
        for node in nodes
    ]
    each = [f"{node.label}: {_listed(own)}" for node, own in zip(nodes, kept, strict=True)]
    return "; ".join(each) or "none"


def _s(needs: Sequence[Need]) -> str:
    return "s" if len(needs) == 1 else ""
