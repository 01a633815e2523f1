"""A profile of one's own cluster under `pdserve simulate` and `pdserve plan`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdserve.domain.errors import LocalFault
from placement.fitted_profile import FittedProfile, Ranks, simulation_yaml, write_profile
from placement.plan import plan_of
from placement.plan_inputs import parse_inputs
from placement.profiles import load_fitted
from placement.search.results import PlanResult
from placement.simulation.settings import parse_config
from placement.simulation.values import PoolRole, SimulationConfig
from placement.solver import solve
from tests.support.fitted import SERVING_PROFILE


@pytest.fixture
def profile_file(tmp_path: Path) -> Path:
    write_profile(SERVING_PROFILE, tmp_path / "p.json")
    return tmp_path / "p.json"


def config(profile_file: Path, **changes: Any) -> SimulationConfig:
    data = yaml.safe_load(simulation_yaml(SERVING_PROFILE, profile_file.name))
    return parse_config({**data, **changes}, source="sim.yaml", folder=profile_file.parent)


def inputs(profile_file: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "latency": {"profile": str(profile_file)},
        "cluster": {"nodes": [{"gpu": "laptop", "gpus_per_node": 3}]},
        "workload": {
            "prompt_tokens": {"mean": 240, "cv": 0.4, "max": 700},
            "output_tokens": {"mean": 20, "cv": 0.4, "max": 60},
        },
        "slo": {"ttft_s": 0.15, "tpot_s": 0.01, "attainment": 0.9},
        "objective": {"goal": "goodput"},
        "search": {"duration_s": 60, "seeds": 2, "what_ifs": False},
        **changes,
    }


def solved(profile_file: Path, **changes: Any) -> PlanResult:
    result = solve(parse_inputs(inputs(profile_file, **changes), source="inputs.yaml"))
    assert isinstance(result, PlanResult)
    return result


def test_simulate_runs_what_was_profiled(profile_file: Path) -> None:
    found = config(profile_file)
    assert found.pdserve == SERVING_PROFILE.options()
    for pool, known in zip(
        found.pools, SERVING_PROFILE.pools(num_prefill=1, num_decode=1), strict=True
    ):
        assert (pool.beside, pool.stolen_s, pool.wake_s) == (
            known.beside,
            known.stolen_s,
            known.wake_s,
        )
        assert (pool.kv_tokens, pool.link, pool.gpu) == (known.kv_tokens, known.link, "laptop")


def test_simulate_lets_settings_have_the_last_word(profile_file: Path) -> None:
    pools = [
        {"role": "prefill", "max_num_tokens": 4096},
        {"role": "decode", "link_gb_per_s": 2.0},
    ]
    found = config(profile_file, pools=pools, pdserve={"handoff_s": 0.05})
    assert found.pdserve == SERVING_PROFILE.options().model_copy(update={"handoff_s": 0.05})
    assert found.pools[0].kv_tokens == 4096
    assert found.pools[1].link.bytes_per_s == 2e9


def test_simulate_refuses_a_cut_that_was_not_profiled(profile_file: Path) -> None:
    pools = [{"role": "prefill", "tp": 2}, {"role": "decode"}]
    with pytest.raises(LocalFault, match="profiled at tp 1 pp 1; got tp 2"):
        config(profile_file, pools=pools)


def test_ranks_that_were_profiled_are_what_is_planned_and_simulated(tmp_path: Path) -> None:
    found = replace(SERVING_PROFILE, prefill_ranks=Ranks(tp=2))
    write_profile(found, tmp_path / "p.json")
    assert load_fitted(str(tmp_path / "p.json"), found.model) == found
    assert [pool.tp for pool in config(tmp_path / "p.json").pools] == [2, 1]
    with pytest.raises(LocalFault, match="profiled at tp 2 pp 1; got tp 1 pp 1"):
        config(tmp_path / "p.json", pools=[{"role": "prefill", "tp": 1}, {"role": "decode"}])
    result = solved(tmp_path / "p.json")
    cuts = {(pool.role, pool.tp, pool.pp) for pool in plan_of(result).pools}
    assert cuts == {(PoolRole.PREFILL, 2, 1), (PoolRole.DECODE, 1, 1)}


def test_ranks_that_a_node_has_no_room_for_are_told(tmp_path: Path) -> None:
    write_profile(replace(SERVING_PROFILE, decode_ranks=Ranks(tp=4)), tmp_path / "p.json")
    with pytest.raises(LocalFault, match=r"decode workers .* TP4, and a node has gpus_per_node 3"):
        solved(tmp_path / "p.json")


def test_stages_that_were_profiled_are_not_simulated(tmp_path: Path) -> None:
    found = replace(SERVING_PROFILE, decode_ranks=Ranks(pp=2))
    write_profile(found, tmp_path / "p.json")
    with pytest.raises(LocalFault, match=r"profiled at tp 1 pp 2 \(decode\).* profile pp 1"):
        solved(tmp_path / "p.json")


def test_other_rules_read_the_file_as_distserves(profile_file: Path) -> None:
    found = config(profile_file, rules="distserve")
    assert found.pools[0].kv_tokens == SERVING_PROFILE.limits.decode_kv_tokens


def test_plan_is_made_from_what_was_profiled(profile_file: Path) -> None:
    result = solved(profile_file)
    plan = plan_of(result)
    assert {pool.role for pool in plan.pools} == {PoolRole.PREFILL, PoolRole.DECODE}
    assert plan.num_gpus <= 3
    assert all(pool.gpu == "laptop" for pool in plan.pools)
    assert plan.limits.max_step_tokens == SERVING_PROFILE.limits.max_step_tokens
    assert "pdserve profile" in plan.sources[0]
    assert ("colocated laptop", "not measured by pdserve profile") in result.stats.rejected


def test_what_requests_cost_each_other_lowers_the_plan(profile_file: Path, tmp_path: Path) -> None:
    undisturbed: FittedProfile = replace(
        SERVING_PROFILE,
        serving=replace(
            SERVING_PROFILE.serving, beside_prefill=1.0, beside_answer=0.0, stolen_s=0.0
        ),
    )
    write_profile(undisturbed, tmp_path / "u.json")
    assert solved(profile_file).goodput < 0.95 * solved(tmp_path / "u.json").goodput


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": {"nodes": [{"gpu": "h100_sxm"}]}}, "'h100_sxm'.*measured on 'laptop'"),
        ({"model": "dmo"}, "did you mean demo"),
        ({"search": {"disaggregated": False}}, "colocated ones were not measured"),
        ({"slo": {"ttft_s": 0.001, "tpot_s": 0.01}}, "below the floor"),
    ],
)
def test_what_cannot_be_planned_is_told(
    profile_file: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LocalFault, match=message):
        solve(parse_inputs(inputs(profile_file, **changes), source="inputs.yaml"))
