"""Prefill and decode instances that share a host: a step takes longer while the others compute.

While a share s of the instances of the other role compute, a step takes 1 + s * (beside - 1) times
as long as alone, a prefill step `beside_answer` times more for each answer that is not its decode
instance's first; see `Pool`. A prefill step under way goes on at the new speed when s changes, a
decode step from the next one on. A new request takes `stolen_s` from the answers under way.
"""

from placement.simulation import pdserve_state as at
from placement.simulation.compiled import compiled, inlined
from placement.simulation.pdserve_state import Cluster, schedule, step_under_way


@inlined
def slowdown(c: Cluster, instance: int) -> float:
    """Time of a step that starts at this moment / alone; 1 for an instance of both roles."""
    row, clock, scalars = c.instances[instance], c.instance_s[instance], c.scalars
    share, answers = 0.0, 0.0
    if row[at.READS] and not row[at.WRITES] and scalars[at.NUM_WRITERS] > 0:
        share = scalars[at.NUM_BUSY_WRITERS] / scalars[at.NUM_WRITERS]
        if clock[at.BESIDE_ANSWER] > 0.0:
            for writer in range(len(c.instances)):
                if not c.instances[writer, at.READS]:
                    answers += max(c.instances[writer, at.ACTIVE] - 1, 0) / scalars[at.NUM_WRITERS]
    elif row[at.WRITES] and not row[at.READS] and scalars[at.NUM_READERS] > 0:
        share = scalars[at.NUM_BUSY_READERS] / scalars[at.NUM_READERS]
    return float(1.0 + share * (clock[at.BESIDE] - 1.0) + answers * clock[at.BESIDE_ANSWER])


@compiled
def count_busy_readers(c: Cluster, change: int, now: float) -> None:
    """A prefill instance began or ended to compute: decode steps change from the next one on."""
    c.scalars[at.NUM_BUSY_READERS] += change
    for writer in range(len(c.instances)):
        row = c.instances[writer]
        if row[at.READS] or row[at.RUN_STEPS] == 0 or c.instance_s[writer, at.BESIDE] == 1.0:
            continue
        if c.scalars[at.NUM_EVENTS] < c.scalars[at.MAX_STALE_EVENTS]:
            cut_run(c, writer, now)


@compiled
def count_busy_writers(c: Cluster, change: int, now: float) -> None:
    """A decode instance began or ended to compute: what is left of prefill steps changes."""
    c.scalars[at.NUM_BUSY_WRITERS] += change
    for reader in range(len(c.instances)):
        row, clock = c.instances[reader], c.instance_s[reader]
        if (
            row[at.WRITES]
            or not row[at.IS_STAGE_BUSY]
            or row[at.DEPTH] > 1
            or clock[at.BESIDE] == 1.0
        ):
            continue
        if c.scalars[at.NUM_EVENTS] >= c.scalars[at.MAX_STALE_EVENTS]:
            continue
        slowed = slowdown(c, reader)
        left_s = (clock[at.STEP_END] - now) * (slowed / clock[at.SLOWED])
        clock[at.BUSY] += now + left_s - clock[at.STEP_END]
        clock[at.STEP_END], clock[at.SLOWED] = now + left_s, slowed
        row[at.VERSION] += 1
        schedule(c, clock[at.STEP_END], at.STEP_DONE, reader, row[at.VERSION] & 0xFFFFFF)


@compiled
def steal(c: Cluster, writer: int, now: float) -> None:
    """A request came, or its KV did: half its work at the decode instance delays the next step."""
    row, clock = c.instances[writer], c.instance_s[writer]
    if row[at.RUN_STEPS] == 0 or clock[at.STOLEN_S] == 0.0:
        return
    clock[at.OWED_S] += 0.5 * clock[at.STOLEN_S]
    if c.scalars[at.NUM_EVENTS] < c.scalars[at.MAX_STALE_EVENTS]:
        cut_run(c, writer, now)


@compiled
def schedule_run_end(c: Cluster, instance: int, steps: int) -> None:
    """A run of `steps` steps, its first begun at RUN_START."""
    row, clock = c.instances[instance], c.instance_s[instance]
    row[at.RUN_STEPS] = steps
    row[at.VERSION] += 1
    span = clock[at.RUN_FIRST] * steps + clock[at.RUN_GROWTH] * (0.5 * steps * (steps - 1))
    schedule(c, clock[at.RUN_START] + span, at.RUN_DONE, instance, row[at.VERSION] & 0xFFFFFF)


@compiled
def cut_run(c: Cluster, instance: int, now: float) -> None:
    """End the run at the end of the step under way."""
    row = c.instances[instance]
    if row[at.IS_CUT] or row[at.RUN_STEPS] == 1:
        return
    row[at.IS_CUT] = 1
    steps = step_under_way(c, instance, now)
    if steps < row[at.RUN_STEPS]:
        schedule_run_end(c, instance, steps)
