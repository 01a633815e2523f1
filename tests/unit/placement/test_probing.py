"""What a cluster must be like to be profiled."""

import pytest

from pdserve.domain.errors import LocalFault
from pdserve.domain.layout import ShardedLayout
from pdserve.domain.messages import ClusterState, Role, WorkerState
from placement.fitted_profile import Ranks
from placement.probing import Workers
from tests.unit.router.builders import COEFFICIENTS, LAYOUT, make_hello, make_load


def state_of(*ranks: tuple[Role, Ranks]) -> ClusterState:
    """A cluster of these workers."""
    workers = [
        WorkerState(
            hello=make_hello(
                f"w{place}", role, layout=ShardedLayout(whole=LAYOUT.whole, tp=own.tp, pp=own.pp)
            ),
            load=make_load(),
            health="alive",
            silence_s=0.0,
            num_assigned=0,
            coefficients=COEFFICIENTS,
        )
        for place, (role, own) in enumerate(ranks)
    ]
    return ClusterState(
        router_id="r", model_name="demo", public_address="", uptime_s=1.0, workers=tuple(workers)
    )


def test_ranks_of_a_profile_are_those_of_the_workers() -> None:
    found = Workers.of(state_of((Role.PREFILL, Ranks(tp=2)), (Role.DECODE, Ranks(pp=2))))
    assert found.ranks(Role.PREFILL) == Ranks(tp=2)
    assert found.ranks(Role.DECODE) == Ranks(pp=2)


def test_workers_of_one_role_that_are_divided_differently_are_refused() -> None:
    mixed = state_of(
        (Role.PREFILL, Ranks(tp=2)), (Role.PREFILL, Ranks()), (Role.DECODE, Ranks(tp=2))
    )
    with pytest.raises(LocalFault, match="prefill workers differ in their ranks: tp 1 pp 1, tp 2"):
        Workers.of(mixed)
