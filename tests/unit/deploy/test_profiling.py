"""`pdserve profile`: what it is told, before it measures for minutes."""

from pathlib import Path

import pytest

from deploy.profiling import profile, profiled_settings
from pdserve.domain.errors import LocalFault


def test_ranks_and_devices_of_profiled_workers_are_those_that_were_asked_for() -> None:
    flags = {"model": "demo", "tp": 2, "device": "cuda", "dtype": "bfloat16"}
    found = profiled_settings(flags, ["decode.pp=2", "decode.tp=1"])
    engines = [worker.engine for worker in found.worker_settings("")]
    assert [(each.tp, each.pp) for each in engines] == [(2, 1), (1, 2)]
    assert {(each.device, each.dtype) for each in engines} == {("cuda", "bfloat16")}
    assert (found.router.port, found.router.internal_port) == (0, 0)
    with pytest.raises(LocalFault, match=r"decode.pp: Input should be greater"):
        profiled_settings(flags, ["decode.pp=0"])


def test_what_is_for_workers_that_it_starts_is_refused_for_those_that_run() -> None:
    with pytest.raises(LocalFault, match="--tp, --device, --set: a cluster that runs has its own"):
        profile(internal_address="127.0.0.1:9", tp=2, device="cuda", setting=["pp=2"])


def test_a_profile_of_gpus_needs_their_name() -> None:
    with pytest.raises(LocalFault, match="--device cuda needs --gpu TYPE"):
        profile(model="demo", device="cuda")


def test_configuration_that_could_not_be_simulated_is_refused_before_measuring(
    tmp_path: Path,
) -> None:
    with pytest.raises(LocalFault, match="--sim: decode workers have pp 2"):
        profile(model="demo", setting=["decode.pp=2"], sim=tmp_path / "sim.yaml")
