"""When a worker or the router counts as lost."""

from deploy.ray.absence import JOIN_S, REJOIN_S, AbsenceJudge, Verdict
from pdserve.config.timers import Timers
from pdserve.domain.messages import ClusterState, WorkerState
from tests.unit.router.builders import make_hello, make_load

TIMERS = Timers()


def worker(name: str, health: str = "alive") -> WorkerState:
    hello = make_hello(name)
    return WorkerState(
        hello=hello,
        load=make_load(),
        health=health,
        silence_s=0.0,
        num_assigned=0,
        coefficients=hello.coefficients,
    )


class Router:
    """Tells a judge what it sees at each moment; up since `since_s`."""

    def __init__(self) -> None:
        self.judge = AbsenceJudge(TIMERS, 0.0)
        self.since_s = 0.0

    def at(self, now_s: float, *workers: WorkerState, since: dict[str, float]) -> Verdict:
        state = ClusterState(
            router_id="r",
            model_name="demo",
            public_address="",
            uptime_s=now_s - self.since_s,
            workers=workers,
        )
        return self.judge.judge(now_s, state, since)


SINCE = {"decode-0": 0.0}


def test_worker_that_is_there_is_not_lost() -> None:
    router = Router()
    for now_s in (0.0, 20.0, 40.0):
        assert router.at(now_s, worker("decode-0"), since=SINCE) == Verdict(lost={})


def test_worker_whose_stream_broke_may_come_back_for_a_moment() -> None:
    router = Router()
    router.at(20.0, worker("decode-0"), since=SINCE)
    assert router.at(20.5, since=SINCE).lost == {}
    assert router.at(20.9, worker("decode-0"), since=SINCE).lost == {}
    assert router.at(20.9 + 0.9 * REJOIN_S, since=SINCE).lost == {}
    lost = router.at(20.9 + 1.1 * REJOIN_S, since=SINCE).lost
    assert "has been gone for 1.1 s" in lost["decode-0"]


def test_worker_that_was_silent_before_is_lost_at_once() -> None:
    router = Router()
    assert router.at(20.0, worker("decode-0", "suspect"), since=SINCE).doubtful == ("decode-0",)
    assert "was silent for 3 s" in router.at(20.1, since=SINCE).lost["decode-0"]


def test_worker_that_never_came_is_lost_after_its_time_to_join() -> None:
    router = Router()
    assert router.at(5.0 + 0.9 * JOIN_S, since={"decode-0": 5.0}).lost == {}
    lost = router.at(5.0 + 1.1 * JOIN_S, since={"decode-0": 5.0}).lost
    assert "has not registered for 11.0 s" in lost["decode-0"]


def test_new_router_is_given_the_same_time_to_find_its_workers() -> None:
    router = Router()
    router.at(20.0, worker("decode-0", "suspect"), since=SINCE)
    router.since_s = 22.0
    assert router.at(22.0 + 0.9 * JOIN_S, since=SINCE).lost == {}
    assert "has not registered" in router.at(22.0 + 1.1 * JOIN_S, since=SINCE).lost["decode-0"]


def test_new_life_of_a_worker_does_not_inherit_what_was_seen_of_the_old_one() -> None:
    router = Router()
    router.at(20.0, worker("decode-0", "suspect"), since=SINCE)
    router.at(20.5, since={})  # being replaced: it does not serve
    assert router.at(26.0, since={"decode-0": 25.0}).lost == {}


def test_router_that_does_not_answer_is_lost_after_dead_s_and_told_once() -> None:
    judge = AbsenceJudge(TIMERS, 0.0)
    assert judge.judge(2.9, None, SINCE).lost == {}
    assert "did not answer for 3.1 s" in judge.judge(3.1, None, SINCE).lost["router"]
    assert judge.judge(3.6, None, SINCE).lost == {}
