"""Prefill and decode instances that share a host: a step takes longer while the others compute.

While a share s of the instances of the other role compute, a step takes 1 + s * (beside - 1) times
as long as alone, a prefill step `beside_answer` times more for each answer that is not its decode
instance's first; see `Pool`. A prefill step under way goes on at the new speed when s changes, a
decode step from the next one on. A new request takes `stolen_s` from the answers under way.
"""

from placement.simulation.compiled import compiled, inlined
from placement.simulation.pdserve_state import (
    ACTIVE,
    BESIDE,
    BESIDE_ANSWER,
    BUSY,
    DEPTH,
    IS_CUT,
    IS_STAGE_BUSY,
    MAX_STALE_EVENTS,
    NUM_BUSY_READERS,
    NUM_BUSY_WRITERS,
    NUM_EVENTS,
    NUM_READERS,
    NUM_WRITERS,
    OWED_S,
    READS,
    RUN_DONE,
    RUN_FIRST,
    RUN_GROWTH,
    RUN_START,
    RUN_STEPS,
    SLOWED,
    STEP_DONE,
    STEP_END,
    STOLEN_S,
    VERSION,
    WRITES,
    Cluster,
    schedule,
    step_under_way,
)


@inlined
def slowdown(c: Cluster, instance: int) -> float:
    """Time of a step that starts at this moment / alone; 1 for an instance of both roles."""
    row, clock, scalars = c.instances[instance], c.instance_s[instance], c.scalars
    share, answers = 0.0, 0.0
    if row[READS] and not row[WRITES] and scalars[NUM_WRITERS] > 0:
        share = scalars[NUM_BUSY_WRITERS] / scalars[NUM_WRITERS]
        if clock[BESIDE_ANSWER] > 0.0:
            for writer in range(len(c.instances)):
                if not c.instances[writer, READS]:
                    answers += max(c.instances[writer, ACTIVE] - 1, 0) / scalars[NUM_WRITERS]
    elif row[WRITES] and not row[READS] and scalars[NUM_READERS] > 0:
        share = scalars[NUM_BUSY_READERS] / scalars[NUM_READERS]
    return float(1.0 + share * (clock[BESIDE] - 1.0) + answers * clock[BESIDE_ANSWER])


@compiled
def count_busy_readers(c: Cluster, change: int, now: float) -> None:
    """A prefill instance began or ended to compute: decode steps change from the next one on."""
    c.scalars[NUM_BUSY_READERS] += change
    for writer in range(len(c.instances)):
        row = c.instances[writer]
        if row[READS] or row[RUN_STEPS] == 0 or c.instance_s[writer, BESIDE] == 1.0:
            continue
        if c.scalars[NUM_EVENTS] < c.scalars[MAX_STALE_EVENTS]:
            cut_run(c, writer, now)


@compiled
def count_busy_writers(c: Cluster, change: int, now: float) -> None:
    """A decode instance began or ended to compute: what is left of prefill steps changes."""
    c.scalars[NUM_BUSY_WRITERS] += change
    for reader in range(len(c.instances)):
        row, clock = c.instances[reader], c.instance_s[reader]
        if row[WRITES] or not row[IS_STAGE_BUSY] or row[DEPTH] > 1 or clock[BESIDE] == 1.0:
            continue
        if c.scalars[NUM_EVENTS] >= c.scalars[MAX_STALE_EVENTS]:
            continue
        slowed = slowdown(c, reader)
        left_s = (clock[STEP_END] - now) * (slowed / clock[SLOWED])
        clock[BUSY] += now + left_s - clock[STEP_END]
        clock[STEP_END], clock[SLOWED] = now + left_s, slowed
        row[VERSION] += 1
        schedule(c, clock[STEP_END], STEP_DONE, reader, row[VERSION] & 0xFFFFFF)


@compiled
def steal(c: Cluster, writer: int, now: float) -> None:
    """A request came, or its KV did: half its work at the decode instance delays the next step."""
    row, clock = c.instances[writer], c.instance_s[writer]
    if row[RUN_STEPS] == 0 or clock[STOLEN_S] == 0.0:
        return
    clock[OWED_S] += 0.5 * clock[STOLEN_S]
    if c.scalars[NUM_EVENTS] < c.scalars[MAX_STALE_EVENTS]:
        cut_run(c, writer, now)


@compiled
def schedule_run_end(c: Cluster, instance: int, steps: int) -> None:
    """A run of `steps` steps, its first begun at RUN_START."""
    row, clock = c.instances[instance], c.instance_s[instance]
    row[RUN_STEPS] = steps
    row[VERSION] += 1
    span = clock[RUN_FIRST] * steps + clock[RUN_GROWTH] * (0.5 * steps * (steps - 1))
    schedule(c, clock[RUN_START] + span, RUN_DONE, instance, row[VERSION] & 0xFFFFFF)


@compiled
def cut_run(c: Cluster, instance: int, now: float) -> None:
    """End the run at the end of the step under way."""
    row = c.instances[instance]
    if row[IS_CUT] or row[RUN_STEPS] == 1:
        return
    row[IS_CUT] = 1
    steps = step_under_way(c, instance, now)
    if steps < row[RUN_STEPS]:
        schedule_run_end(c, instance, steps)
