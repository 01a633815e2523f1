"""What the router takes steps to cost: workers that are alike, until their steps differ."""

import math
from collections import Counter
from dataclasses import fields, replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.config.timers import Timers
from pdserve.domain.ids import AttemptId, RequestId, WorkerId
from pdserve.domain.latency import LiveSteps, StepCoefficients, StepShape
from pdserve.domain.messages import Role, WorkerHello, WorkerLoad
from pdserve.engine.live_steps import LiveStepTimes
from router.cluster_view import Ledger, RequestShape
from router.membership import Member, Membership
from router.policy import Pair, least_total_time
from router.step_times import step_times
from tests.unit.router.builders import OTHER_LAYOUT, make_hello, make_load
from tests.unit.router.played_cluster import open_link

TRUE = StepCoefficients(
    fixed_s=3e-3,
    prefill_token_s=3e-4,
    prefill_attention_s=4e-7,
    decode_token_s=4e-4,
    decode_context_token_s=1e-6,
)
SHAPE = RequestShape(num_prompt_tokens=64, max_tokens=60)
NUM_BURST = 48
SEEDS = range(15)


def scaled(times: StepCoefficients, factor: float) -> StepCoefficients:
    return replace(
        times, **{entry.name: factor * getattr(times, entry.name) for entry in fields(times)}
    )


class Cluster:
    """A router's membership, and workers whose true speed the test knows.

    Every worker measured its step times once, well or badly; a burst is placed at once, then its
    decode workers take steps with noise and report them.
    """

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now_s = 0.0
        self.ledger = Ledger()
        self.membership = Membership(timers=Timers(suspect_s=1e9, dead_s=2e9), ledger=self.ledger)
        self.members: dict[WorkerId, Member] = {}
        self.live: dict[WorkerId, LiveStepTimes] = {}
        self.true: dict[WorkerId, StepCoefficients] = {}
        self.num_bursts = 0

    def add(
        self,
        name: str,
        *,
        measured: StepCoefficients,
        true: StepCoefficients = TRUE,
        role: Role = Role.DECODE,
        **changes: Any,
    ) -> None:
        given: dict[str, Any] = {"hardware": "cpu", "is_measured": True, **changes}
        sizes = {"num_blocks": 4096, "max_num_requests": 64}
        hello = make_hello(name, role, coefficients=measured, **sizes, **given)
        member = self.membership.admit(hello, self.now_s)
        member.link = open_link(member)
        self.members[hello.worker_id] = member
        self.live[hello.worker_id] = LiveStepTimes(measured, lambda: self.now_s)
        self.true[hello.worker_id] = true

    def burst(self, num: int = NUM_BURST) -> Counter[str]:
        """Where so many equal requests at once go; then they are served."""
        self.num_bursts += 1
        taken: Counter[str] = Counter()
        attempts = []
        for number in range(num):
            pair = least_total_time.choose(self.membership.view(self.now_s), SHAPE)
            assert isinstance(pair, Pair)
            attempts.append(AttemptId(RequestId(f"{self.num_bursts}.{number}"), 1))
            self.ledger.assign(
                attempts[-1],
                SHAPE,
                decode=pair.decode.hello.worker_id,
                reader=pair.reader.hello.worker_id,
                block_size=16,
            )
            taken[pair.decode.hello.worker_id] += 1
        for worker_id, live in self.live.items():
            self._serve(worker_id, live, taken[worker_id])
        for attempt in attempts:
            self.ledger.release(attempt)
        self.pass_time(1.0)
        return taken

    def pass_time(self, seconds: float) -> None:
        """Let workers idle, and report."""
        self.now_s += seconds
        for worker_id, member in self.members.items():
            live = self.live[worker_id]
            load = make_load(
                4096,
                sequence=self.num_bursts,
                prefill_steps=live.prefill_steps(),
                decode_steps=live.decode_steps(),
            )
            self.membership.hear(member, load, self.now_s)

    def _serve(self, worker_id: WorkerId, live: LiveStepTimes, num: int) -> None:
        if not num:
            return
        for index in range(SHAPE.max_tokens):
            shape = StepShape(num_decodes=num, num_decode_context_tokens=num * (64 + index))
            busy = self.rng.lognormvariate(0.0, 0.4)
            live.note(shape, self.true[worker_id].step_s(shape) * busy)


BAD = {
    "2.7 times slower": scaled(TRUE, 2.7),
    "2.7 times faster": scaled(TRUE, 1 / 2.7),
    "nothing for a request": replace(TRUE, fixed_s=2.5 * TRUE.fixed_s, decode_token_s=0.0),
    "nothing for a step": replace(TRUE, fixed_s=0.0, decode_token_s=1.3 * TRUE.decode_token_s),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("wrong", BAD)
def test_equal_workers_get_equal_shares_however_one_was_measured(wrong: str, seed: int) -> None:
    """From the first burst on."""
    cluster = Cluster(seed)
    cluster.add("d0", measured=BAD[wrong])
    cluster.add("d1", measured=TRUE)
    for number in range(8):
        taken = cluster.burst()
        assert min(taken["d0"], taken["d1"]) >= 18, f"seed {seed}, burst {number}: {taken}"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("measured", [TRUE, scaled(TRUE, 3.0), scaled(TRUE, 0.5)])
def test_worker_that_is_three_times_slower_gets_less(measured: StepCoefficients, seed: int) -> None:
    cluster = Cluster(seed)
    cluster.add("d0", measured=measured, true=scaled(TRUE, 3.0))
    cluster.add("d1", measured=TRUE)
    bursts = [cluster.burst()["d0"] for _ in range(8)][2:]
    assert max(bursts) <= 23, f"seed {seed}: {bursts} of {NUM_BURST}"
    assert sum(bursts) <= 18.5 * len(bursts), f"seed {seed}: {bursts} of {NUM_BURST}"


@pytest.mark.parametrize("seed", SEEDS)
def test_worker_that_has_become_slower_gets_less_and_then_its_share_again(seed: int) -> None:
    cluster = Cluster(seed)
    for name in ("d0", "d1"):
        cluster.add(name, measured=TRUE)
    cluster.burst()
    cluster.true[WorkerId("d0")] = scaled(TRUE, 3.0)
    slow = [cluster.burst()["d0"] for _ in range(8)][4:]
    assert sum(slow) <= 19.5 * len(slow), f"seed {seed}: {slow} of {NUM_BURST}"
    cluster.true[WorkerId("d0")] = TRUE
    again = [cluster.burst()["d0"] for _ in range(12)][8:]
    assert sum(again) >= 20 * len(again), f"seed {seed}: {again} of {NUM_BURST}"


def test_worker_that_was_slow_is_tried_again_when_that_is_long_ago() -> None:
    """Even one so slow that nothing goes there, and nothing would correct it."""
    cluster = Cluster(1)
    cluster.add("d0", measured=TRUE, true=scaled(TRUE, 30.0))
    cluster.add("d1", measured=TRUE)
    cluster.burst()
    assert cluster.burst(10)["d0"] == 0
    cluster.true[WorkerId("d0")] = TRUE
    cluster.pass_time(900.0)
    assert cluster.burst()["d0"] >= 18


@pytest.mark.parametrize(
    "other",
    [
        {"hardware": "gpu"},
        {"hardware": ""},
        {"is_measured": False},
        {"layout": OTHER_LAYOUT},
        {"engine": "other"},
    ],
)
def test_workers_that_need_not_be_alike_keep_what_they_measured(other: dict[str, Any]) -> None:
    cluster = Cluster(0)
    cluster.add("d0", measured=scaled(TRUE, 3.0), **other)
    cluster.add("d1", measured=TRUE)
    found = step_times(reports(cluster))
    assert found[WorkerId("d0")] == scaled(TRUE, 3.0)
    assert found[WorkerId("d1")] == TRUE
    assert cluster.burst()["d0"] <= 12


def test_given_times_are_not_doubted_but_corrected() -> None:
    """Workers given different times are not alike; one that is slower than was given is found."""
    cluster = Cluster(0)
    cluster.add("d0", measured=scaled(TRUE, 3.0), true=scaled(TRUE, 6.0), is_measured=False)
    cluster.add("d1", measured=TRUE, is_measured=False)
    assert step_times(reports(cluster))[WorkerId("d0")] == scaled(TRUE, 3.0)
    for _ in range(3):
        cluster.burst()
    found = step_times(reports(cluster))
    assert found[WorkerId("d0")].fixed_s == pytest.approx(6.0 * TRUE.fixed_s, rel=0.2)
    assert found[WorkerId("d1")].fixed_s == pytest.approx(TRUE.fixed_s, rel=0.2)


def test_worker_without_steps_is_taken_to_be_as_slow_as_its_likes() -> None:
    cluster = Cluster(0)
    for name in ("d0", "d1", "d2"):
        cluster.add(name, measured=TRUE, true=scaled(TRUE, 2.0))
    shape = StepShape(num_decodes=4, num_decode_context_tokens=400)
    for _ in range(100):
        cluster.live[WorkerId("d0")].note(shape, 2.0 * TRUE.step_s(shape))
    cluster.pass_time(1.0)
    found = step_times(reports(cluster))
    assert found[WorkerId("d0")].fixed_s == pytest.approx(2.0 * TRUE.fixed_s)
    assert found[WorkerId("d0")] == found[WorkerId("d1")] == found[WorkerId("d2")]


def test_prompts_and_answers_are_corrected_apart() -> None:
    cluster = Cluster(0)
    cluster.add("d0", measured=TRUE)
    live = cluster.live[WorkerId("d0")]
    prompt = StepShape(num_prefill_tokens=300, num_prefill_pairs=45_150)
    answers = StepShape(num_decodes=10, num_decode_context_tokens=1000)
    for _ in range(50):
        live.note(prompt, 3.0 * TRUE.step_s(prompt))
        live.note(answers, 0.5 * TRUE.step_s(answers))
    cluster.pass_time(1.0)
    found = step_times(reports(cluster))[WorkerId("d0")]
    assert found.prefill_token_s == pytest.approx(3.0 * TRUE.prefill_token_s)
    assert found.prefill_attention_s == pytest.approx(3.0 * TRUE.prefill_attention_s)
    assert found.fixed_s == pytest.approx(0.5 * TRUE.fixed_s)
    assert found.decode_token_s == pytest.approx(0.5 * TRUE.decode_token_s)


def test_steps_that_take_what_was_given_change_nothing() -> None:
    """As with the timed engine: not a bit."""
    cluster = Cluster(0)
    for name in ("d0", "d1"):
        cluster.add(name, measured=TRUE, is_measured=False)
        for num in range(1, 400):
            shape = StepShape(num_decodes=num % 30, num_decode_context_tokens=100 * num)
            cluster.live[WorkerId(name)].note(shape, TRUE.step_s(shape))
    cluster.pass_time(1.0)
    for found in step_times(reports(cluster)).values():
        for entry in fields(found):
            assert getattr(found, entry.name) == pytest.approx(getattr(TRUE, entry.name), rel=1e-12)


def test_view_takes_reports_once_a_heartbeat_and_members_at_once() -> None:
    cluster = Cluster(0)
    cluster.add("d0", measured=TRUE)
    shape = StepShape(num_decodes=4, num_decode_context_tokens=400)
    assert seen(cluster, "d0") == TRUE
    for _ in range(100):
        cluster.live[WorkerId("d0")].note(shape, 2.0 * TRUE.step_s(shape))
    cluster.pass_time(1.0)
    assert seen(cluster, "d0").fixed_s == pytest.approx(2.0 * TRUE.fixed_s)
    cluster.add("d1", measured=scaled(TRUE, 3.0))
    assert seen(cluster, "d1").fixed_s == pytest.approx(2.0 * TRUE.fixed_s, rel=0.2)
    assert cluster.membership.worker_states(cluster.now_s)[1].coefficients == seen(cluster, "d1")


def seen(cluster: Cluster, name: str) -> StepCoefficients:
    view = cluster.membership.view(cluster.now_s)
    return next(each for each in view.decode if each.hello.worker_id == name).coefficients


def reports(cluster: Cluster) -> list[tuple[WorkerHello, WorkerLoad]]:
    return [(member.hello, member.load) for member in cluster.members.values()]


TIMES = st.sampled_from((0.0, 1e-12, 1e-3, 10.0))
COEFFICIENTS = st.builds(
    StepCoefficients,
    fixed_s=TIMES,
    prefill_token_s=TIMES,
    prefill_attention_s=TIMES,
    decode_token_s=TIMES,
    decode_context_token_s=TIMES,
)
POSITIVE = st.sampled_from((5e-324, 1e-9, 0.01, 1.0, 1e9, 1e308))
STEPS = st.none() | st.builds(
    LiveSteps,
    num_steps=st.integers(1, 2**32 - 1),
    shape=st.builds(
        StepShape,
        num_prefill_tokens=st.integers(0, 10**6),
        num_prefill_pairs=st.integers(0, 10**9),
        num_decodes=st.integers(0, 10**4),
        num_decode_context_tokens=st.integers(0, 10**7),
    ),
    elapsed_s=POSITIVE,
    relative_error=st.just(0.0) | POSITIVE,
    age_s=st.just(0.0) | POSITIVE,
)


@given(
    workers=st.lists(
        st.tuples(COEFFICIENTS, STEPS, STEPS, st.booleans(), st.sampled_from(("", "a", "b"))),
        max_size=6,
    )
)
def test_times_are_finite_and_zero_only_where_measured_so(workers: list[Any]) -> None:
    """Whatever peers report; the order of the reports makes no difference."""
    given_reports = []
    for number, (coefficients, prefill, decode, is_measured, hardware) in enumerate(workers):
        hello = make_hello(
            f"d{number}",
            coefficients=coefficients,
            is_measured=is_measured,
            hardware=hardware,
        )
        given_reports.append((hello, make_load(prefill_steps=prefill, decode_steps=decode)))
    found = step_times(given_reports)
    assert found == step_times(given_reports[::-1])
    assert set(found) == {hello.worker_id for hello, _ in given_reports}
    for times in found.values():
        for entry in fields(times):
            value = getattr(times, entry.name)
            assert 0 <= value < math.inf
            likes = [getattr(hello.coefficients, entry.name) for hello, _ in given_reports]
            assert value > 0 or min(likes) == 0
