"""Pair choice over any cluster; the account over any order of events."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.domain.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.domain.latency import StepCoefficients
from pdserve.domain.messages import Reads, Role
from pdserve.domain.pair_cost import PolicyName
from pdserve.domain.tokens import Failed
from router.capacity import can_read, can_write
from router.cluster_view import (
    NOTHING,
    Assigned,
    ClusterView,
    Health,
    Ledger,
    Life,
    RequestShape,
    WorkerView,
)
from router.failures import MOVED
from router.policy import (
    MAX_NUM_PREFILL_TARGETS,
    POLICIES,
    NoWorkers,
    Overloaded,
    Pair,
    least_total_time,
    read_s,
)
from tests.support.plain_policy import PlainPolicy
from tests.unit.router.builders import LAYOUT, OTHER_LAYOUT, make_load, make_view, make_worker
from tests.unit.router.played_cluster import DONE, PlayedCluster, open_played_cluster, settle

choose_pair = least_total_time.choose
OF_DECODE = [Reads.OWN, Reads.NONE]
SMALL = st.floats(0, 0.1)
COUNT = st.integers(0, 3000)
SHAPES = st.builds(
    RequestShape, num_prompt_tokens=st.integers(1, 3000), max_tokens=st.integers(1, 500)
)


@st.composite
def workers(draw: st.DrawFn, name: str, role: Role) -> WorkerView:
    num_blocks = draw(st.integers(1, 200))
    in_use = draw(st.integers(0, num_blocks))
    return make_worker(
        name,
        role,
        health=draw(st.sampled_from(Health)),
        load=make_load(
            num_blocks,
            in_use,
            num_waiting=draw(st.integers(0, 9)),
            num_running=draw(st.integers(0, 9)),
            waiting_prompt_tokens=draw(COUNT),
            running_context_tokens=draw(COUNT),
        ),
        assigned=Assigned(
            num_requests=draw(st.integers(0, 9)),
            num_blocks=draw(st.integers(0, 300)),
            num_context_tokens=draw(COUNT),
            num_unread_tokens=draw(COUNT),
            num_unread_pairs=draw(st.integers(0, 10**6)),
        ),
        epoch=Epoch(draw(st.integers(0, 3))),
        num_blocks=num_blocks,
        block_size=draw(st.sampled_from([1, 16, 64])),
        max_num_requests=draw(st.integers(1, 9)),
        max_step_tokens=512,
        max_context_tokens=draw(st.sampled_from([500, 4000])),
        reads=Reads.OTHERS if role is Role.PREFILL else draw(st.sampled_from(OF_DECODE)),
        num_stages=draw(st.sampled_from([1, 1, 3])),
        model_hash=draw(st.sampled_from([b"m", b"n"])),
        layout=draw(st.sampled_from([LAYOUT, OTHER_LAYOUT, None])),
        coefficients=StepCoefficients(
            fixed_s=draw(SMALL),
            prefill_token_s=draw(SMALL),
            prefill_attention_s=draw(SMALL),
            decode_token_s=draw(SMALL),
            decode_context_token_s=draw(SMALL),
        ),
    )


@st.composite
def views(draw: st.DrawFn) -> ClusterView:
    prefill = [draw(workers(f"p{index}", Role.PREFILL)) for index in range(draw(st.integers(0, 5)))]
    decode = [draw(workers(f"d{index}", Role.DECODE)) for index in range(draw(st.integers(0, 4)))]
    return make_view(*prefill, *decode)


def at_hand(worker: WorkerView) -> WorkerView:
    """Healthy, of one format and with room, so that many can be chosen."""
    hello = replace(
        worker.hello,
        model_hash=b"m",
        layout=LAYOUT,
        num_blocks=4000,
        max_context_tokens=4000,
    )
    return worker._replace(hello=hello, health=Health.ALIVE)


def draw_excluded(data: st.DataObject, view: ClusterView) -> frozenset[Life]:
    known = [worker.life for worker in (*view.prefill, *view.decode)]
    return frozenset(data.draw(st.lists(st.sampled_from(known)))) if known else frozenset()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    view=views(),
    shape=SHAPES,
    name=st.sampled_from(list(POLICIES)),
    is_alike=st.booleans(),
)
def test_choice_is_that_of_the_plain_definition(
    data: st.DataObject, view: ClusterView, shape: RequestShape, name: PolicyName, is_alike: bool
) -> None:
    if is_alike:
        view = ClusterView(
            prefill=tuple(map(at_hand, view.prefill)), decode=tuple(map(at_hand, view.decode))
        )
    excluded = draw_excluded(data, view)
    plain = PlainPolicy(name=name).choose
    # Limits that some reader just meets, and none.
    for limit_s in (*map(read_s, (*view.prefill, *view.decode)), float("inf")):
        choice = POLICIES[name].choose(view, shape, excluded=excluded, max_wait_s=limit_s)
        assert choice == plain(view, shape, excluded=excluded, max_wait_s=limit_s)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), view=views(), shape=SHAPES, name=st.sampled_from(list(POLICIES)))
def test_choice_is_total_deterministic_and_never_an_excluded_worker(
    data: st.DataObject, view: ClusterView, shape: RequestShape, name: PolicyName
) -> None:
    choose_pair, excluded = POLICIES[name].choose, draw_excluded(data, view)
    choice = choose_pair(view, shape, excluded=excluded)
    assert choice == choose_pair(view, shape, excluded=excluded)
    mirrored = replace(view, prefill=view.prefill[::-1], decode=view.decode[::-1])
    assert choice == choose_pair(mirrored, shape, excluded=excluded)
    fitting = [
        worker
        for worker in view.decode
        if worker.life not in excluded and can_write(worker.hello, shape)
    ]
    possible = [worker for worker in fitting if worker.is_usable]
    possible = possible or [worker for worker in fitting if worker.health is Health.SUSPECT]
    if not possible:
        assert choice == NoWorkers()
        return
    assert isinstance(choice, Pair)
    assert choice.decode in possible
    targets = choice.prefill_targets
    assert len(set(targets)) == len(targets) <= MAX_NUM_PREFILL_TARGETS
    for target in targets:
        assert target.is_usable
        assert target.life not in excluded
        assert target.can_exchange_kv_with(choice.decode)
        assert can_read(target.hello, shape)
    if choice.decode.hello.reads is Reads.OWN:
        assert not targets
    elif not targets:
        assert not any(
            worker.is_usable
            and worker.life not in excluded
            and worker.can_exchange_kv_with(choice.decode)
            and can_read(worker.hello, shape)
            for worker in view.prefill
        )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(view=views(), shape=SHAPES, max_wait_s=st.floats(0, 100))
def test_refusal_for_load_names_a_time_and_only_follows_from_the_limit(
    view: ClusterView, shape: RequestShape, max_wait_s: float
) -> None:
    choice = choose_pair(view, shape, max_wait_s=max_wait_s)
    unlimited = choose_pair(view, shape)
    if isinstance(choice, Overloaded):
        assert choice.retry_after_s > 0
        assert isinstance(unlimited, Pair)
        # Whoever comes back when it is told to finds a queue that is short enough.
        later = choose_pair(view, shape, max_wait_s=max_wait_s + choice.retry_after_s + 1e-9)
        assert isinstance(later, Pair)
    elif isinstance(choice, Pair):
        assert choice.wait_s <= max_wait_s
        if isinstance(unlimited, Pair) and unlimited.wait_s <= max_wait_s:
            assert choice == unlimited


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(view=views(), shape=SHAPES, max_wait_s=st.floats(0, 100))
def test_nobody_is_refused_while_some_reader_meets_the_wait(
    view: ClusterView, shape: RequestShape, max_wait_s: float
) -> None:
    if not isinstance(choose_pair(view, shape, max_wait_s=max_wait_s), Overloaded):
        return
    for decode in view.decode:
        if decode.is_usable:
            alone = choose_pair(replace(view, decode=(decode,)), shape, max_wait_s=max_wait_s)
            assert isinstance(alone, Overloaded | NoWorkers)
    for reader in view.prefill:
        pair = choose_pair(replace(view, prefill=(reader,)), shape, max_wait_s=max_wait_s)
        assert not isinstance(pair, Pair) or reader not in pair.prefill_targets


@settings(max_examples=100, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.sampled_from(["assign", "read", "release"]), st.integers(0, 5), SHAPES),
        max_size=40,
    )
)
def test_account_is_the_sum_of_what_is_open_and_returns_to_nothing(
    events: list[tuple[str, int, RequestShape]],
) -> None:
    ledger = Ledger()
    open_attempts: dict[AttemptId, RequestShape] = {}
    for kind, number, shape in events:
        attempt = AttemptId(RequestId(str(number)), 1)
        decode, reader = WorkerId(f"d{number % 2}"), WorkerId(f"{'pd'[number // 3]}{number % 2}")
        if kind == "assign" and attempt not in open_attempts:
            ledger.assign(attempt, shape, decode=decode, reader=reader, block_size=16)
            open_attempts[attempt] = shape
        elif kind == "read":
            ledger.mark_read(attempt)
        elif kind == "release":
            ledger.release(attempt)
            open_attempts.pop(attempt, None)
        held = [ledger.assigned(WorkerId(f"d{index}")) for index in range(2)]
        assert sum(part.num_requests for part in held) == len(open_attempts)
        assert sum(part.num_blocks for part in held) == sum(
            shape.num_blocks(16) for shape in open_attempts.values()
        )
    for attempt in list(open_attempts):
        ledger.release(attempt)
    assert ledger.is_empty
    assert ledger.assigned(WorkerId("d0")) == NOTHING


# The dispatcher -----------------------------------------------------------------------------------

NAMES = ("d0", "d1", "d2")


class Play:
    """Requests at a dispatcher, and events that befall them and their workers."""

    def __init__(self, cluster: PlayedCluster) -> None:
        self.cluster = cluster
        self.tasks: dict[str, asyncio.Task[Any]] = {}
        self.num_said: dict[tuple[str, int], int] = {}

    async def start(self, number: int) -> None:
        label = f"r{len(self.tasks)}"
        self.tasks[label] = self.cluster.start(label)

    async def cancel(self, number: int) -> None:
        if self.tasks:
            list(self.tasks.values())[number % len(self.tasks)].cancel()

    async def cut(self, number: int) -> None:
        await self.cluster.workers[NAMES[number % len(NAMES)]].cut()

    async def drain(self, number: int) -> None:
        if number == 0:
            await self.cluster.dispatcher.drain(0.0)

    async def say(self, number: int) -> None:
        self.answer(number, end=None)

    async def finish(self, number: int) -> None:
        self.answer(number, end=DONE)

    async def fail(self, number: int) -> None:
        reason = sorted(MOVED)[number % len(MOVED)]
        self.answer(number, end=Failed(reason=reason, message="no"))

    async def repeat(self, number: int) -> None:
        self.answer(number, end=None, back=1)

    async def skip(self, number: int) -> None:
        self.answer(number, end=None, back=-1)

    def answer(self, number: int, *, end: Any, back: int = 0) -> None:
        open_submits = [
            (worker, submit)
            for worker in self.cluster.workers.values()
            for submit in worker.open.values()
        ]
        if not open_submits:
            return
        worker, submit = open_submits[number % len(open_submits)]
        key = (submit.request_id, submit.attempt)
        said = self.num_said.get(key, 0)
        worker.say(submit, max(said - back, 0), 1, end)
        self.num_said[key] = said + (back == 0)


EVENTS: dict[str, Callable[[Play, int], Coroutine[Any, Any, None]]] = {
    "start": Play.start,
    "cancel": Play.cancel,
    "cut": Play.cut,
    "drain": Play.drain,
    "say": Play.say,
    "finish": Play.finish,
    "fail": Play.fail,
    "repeat": Play.repeat,
    "skip": Play.skip,
}


@settings(max_examples=60, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.sampled_from(["start", "say", *EVENTS]), st.integers(0, 20), st.booleans()),
        max_size=30,
    )
)
def test_nothing_is_held_after_any_order_of_events(events: list[tuple[str, int, bool]]) -> None:
    async def run() -> None:
        async with open_played_cluster(*NAMES) as cluster:
            play = Play(cluster)
            for kind, number, is_settled in events:
                await EVENTS[kind](play, number)
                if is_settled:
                    await settle()
            await settle()
            for task in play.tasks.values():
                task.cancel()
            await asyncio.gather(*play.tasks.values(), return_exceptions=True)
            await settle()
            assert cluster.is_idle
            for received in cluster.received.values():
                assert received == list(range(len(received)))
            ended = cluster.in_flight.counts.total()
            assert ended <= len(play.tasks)  # one cancelled before its first step never entered

    asyncio.run(run())
