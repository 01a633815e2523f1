"""One plan of prefill workers of TP 2 and decode workers of PP 2, with the torch engine: locally.

On Ray it is in `test_ray_cluster.py`, which has a cluster of nodes.
"""

import asyncio
import os
import signal
from pathlib import Path

import psutil

from deploy.deployment import Deployment
from deploy.local import LocalCluster
from deploy.machine_load import families
from deploy.opening import read_deployment
from tests.support.rank_plans import smoke, write_rank_plan
from tests.support.waiting import wait_until

GONE_S = 3.0
BACK_S = 90.0


def deployment(folder: Path) -> Deployment:
    flags = {"router.port": 0, "router.internal_port": 0}
    return read_deployment(write_rank_plan(folder), flags, ["timers.drain_s=5"])


def ranks_of(cluster: LocalCluster, name: str) -> tuple[int, ...]:
    """Process ids of a worker's ranks, rank 0 first."""
    return families([cluster.process(name).pid])


async def test_a_plan_of_tp_and_pp_serves_and_a_worker_that_lost_a_rank_comes_back(
    tmp_path: Path,
) -> None:
    async with LocalCluster.start(deployment(tmp_path)) as cluster:
        shown = {row.name: row.num_ranks for row in cluster.rows}
        assert shown == {"router": 1, "prefill-0": 2, "decode-0": 2}
        assert await smoke(cluster) == ""
        lost = ranks_of(cluster, "decode-0")
        everyone = {*lost, *ranks_of(cluster, "prefill-0")}
        assert len(everyone) == 4
        os.kill(lost[-1], signal.SIGKILL)
        await wait_until(
            lambda: not any(map(psutil.pid_exists, lost)), within_s=GONE_S, what="all ranks ended"
        )
        async with asyncio.timeout(BACK_S):
            while "serves again" not in (said := (await cluster.next_event()).message):
                assert "decode-0" in said or "note: " in said
        assert await smoke(cluster) == ""
        everyone |= {*ranks_of(cluster, "decode-0")}
    assert not [pid for pid in everyone if psutil.pid_exists(pid)]
