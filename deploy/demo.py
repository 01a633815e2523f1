"""`make demo`: real tokens through 1 router, 2 prefill and 2 decode processes on this machine.

Exits 0 only if every request was answered, no KV block is held afterwards and no process is left.
"""

import asyncio
import os
import sys
import time

from deploy.local import LocalCluster
from pdserve.cli.benching import Plan, measure, render_report
from pdserve.cli.generating import Question, answer
from pdserve.cli.output import command_output
from pdserve.cli.problems import ClusterFailed, exit_code, explain
from pdserve.cli.status_view import WIDE_COLUMNS, plain_console, render_state
from pdserve.client.admin import AdminClient
from pdserve.client.statistics import Slo
from pdserve.client.values import Sampling
from pdserve.config.cluster import ClusterSettings, DecodePool, PrefillPool, RouterPool
from pdserve.domain.errors import PdserveError
from pdserve.domain.messages import ClusterState

PROMPT = "def read_lines(path):"
BLOCKS_FREE_WITHIN_S = 5.0
SETTINGS = ClusterSettings(
    router=RouterPool(port=0, internal_port=0),
    prefill=PrefillPool(replicas=2),
    decode=DecodePool(replicas=2),
    log_level="warning",
)
PLAN = Plan(
    trace="azure-code", time_scale=0.35, num_requests=60, slo=Slo(ttft_s=1.0, tpot_s=0.1), seed=1
)


def main() -> None:
    """Run the demo and exit."""
    started = time.monotonic()
    with command_output():
        try:
            asyncio.run(run_demo())
        except KeyboardInterrupt:
            sys.exit(130)
        except PdserveError as error:
            print(f"demo failed: {explain(error)}", file=sys.stderr)
            sys.exit(exit_code(error))
        _say(f"all went well, in {time.monotonic() - started:.0f} s")


async def run_demo() -> None:
    """Start, ask, load, check, stop; raises `PdserveError` for whatever did not go well."""
    console = plain_console()
    started = time.monotonic()
    _say("starting 1 router, 2 prefill workers, 2 decode workers")
    async with LocalCluster.start(SETTINGS) as cluster:
        pids = [process.pid for process in cluster.processes]
        _say(f"ready in {time.monotonic() - started:.1f} s; asking: {PROMPT}\n")
        print(PROMPT, end="", flush=True)
        question = Question(prompt=PROMPT, sampling=Sampling(max_tokens=64))
        await answer(cluster.public_address, question)

        print()
        _say(f"replaying {PLAN.num_requests} requests of the Azure code trace, lengths scaled")
        report, _ = await measure(cluster.public_address, PLAN)
        for table in render_report(report):
            console.print(table)
        _say(f"the handoff added {report.handoff_share:.1%} of the requests' time")
        if report.num_ok != report.num_requests:
            raise ClusterFailed(f"requests failed: {report.failures}")

        state = await idle_state(cluster.internal_address)
        console.print(render_state(state, is_wide=console.width >= WIDE_COLUMNS))
        _say("every KV block is free again; stopping")
    left = [pid for pid in pids if _is_alive(pid)]
    if left:
        raise ClusterFailed(f"processes are left: {left}")


async def idle_state(internal_address: str) -> ClusterState:
    """The state once no worker holds a block; raises `ClusterFailed` where some stay held."""
    async with AdminClient(internal_address) as admin:
        state = await admin.settled_state(BLOCKS_FREE_WITHIN_S)
    if state.busy_workers:
        raise ClusterFailed(f"KV blocks are still held by: {', '.join(state.busy_workers)}")
    return state


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    main()
