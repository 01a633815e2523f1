import os
from pathlib import Path

import pytest

from deploy.deployment import Deployment
from deploy.opening import read_deployment
from deploy.up import DEFAULT_ADDRESSES
from pdserve.config.processes import RouterSettings
from pdserve.domain.errors import LocalFault
from pdserve.domain.messages import Role


def opened(flags: dict[str, object], *assignments: str) -> Deployment:
    return read_deployment(None, flags, assignments)


def test_flags_that_were_not_given_change_nothing() -> None:
    deployment = opened({"model": None, "router.port": 0})
    assert deployment.router.model == "demo"
    assert deployment.router.port == 0
    assert [worker.name for worker in deployment.workers] == ["prefill-0", "decode-0"]


def test_assignments_are_yaml_and_flags_win_over_them() -> None:
    deployment = opened(
        {"decode.replicas": 3},
        *("decode.replicas=2", "prefix_reuse=false", "transports=[tcp]", "timers.drain_s=1.5"),
    )
    assert len(deployment.of_role(Role.DECODE)) == 3
    settings = deployment.workers[0].settings
    assert settings.engine.prefix_reuse is False
    assert settings.transports == ("tcp",)
    assert deployment.drain_s == 1.5


@pytest.mark.parametrize("text", ["port", "=3", "a=[", "router=1"])
def test_bad_assignment_is_named(text: str) -> None:
    with pytest.raises(LocalFault):
        opened({}, text)


def test_what_is_for_plans_only_is_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(LocalFault, match="are for plan files"):
        read_deployment(None, {}, [], scale=0.5)


def test_workers_are_pinned_only_when_asked_or_planned() -> None:
    cpus = os.sched_getaffinity(0)
    assert all(worker.settings.cpus == () for worker in opened({}).workers)
    pinned = read_deployment(None, {}, [], pin=True)
    if len(cpus) >= 2:
        prefill, decode = (set(worker.settings.cpus) for worker in pinned.workers)
        assert prefill
        assert decode
        assert not prefill & decode
        assert prefill | decode <= cpus


def test_default_ports_are_those_of_the_settings() -> None:
    router = RouterSettings()
    ports = (router.port, router.internal_port)
    assert tuple(f"{router.host}:{port}" for port in ports) == DEFAULT_ADDRESSES
