"""A plan whose prefill workers are tensor parallel and whose decode workers have stages."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy.backend import Cluster
from tests.support.plans import plan, pool
from tests.support.up_runs import pdserve

# Ranks that share cores are slow: what is promised here is no promise of speed.
PATIENT: Mapping[str, Any] = {
    "max_step_tokens": 256,
    "max_num_requests": 12,
    "max_num_waiting": 40,
    "max_wait_s": 60.0,
    "max_rate": 100.0,
    "max_burst": 200,
}


def write_rank_plan(folder: Path, **of_pools: Any) -> Path:
    """One prefill worker of TP 2 and one decode worker of PP 2; `nodes` are theirs in turn."""
    nodes: tuple[list[str], list[str]] = of_pools.pop("nodes", ([], []))
    pools = [
        pool("prefill", 1, tp=2, kv_tokens=16384, nodes=nodes[0], **of_pools),
        pool("decode", 1, pp=2, kv_tokens=16384, nodes=nodes[1], **of_pools),
    ]
    path = folder / "ranks.yaml"
    path.write_text(yaml.safe_dump(plan(pools=pools, block_size=16, limits=dict(PATIENT))))
    return path


async def smoke(cluster: Cluster) -> str:
    """Empty if `pdserve smoke` passes, beside the running cluster; else what it said."""
    addresses = ("-a", cluster.public_address, "-i", cluster.internal_address)
    done = await asyncio.to_thread(pdserve, "smoke", *addresses)
    return "" if done.returncode == 0 else (done.stdout + done.stderr).decode()
