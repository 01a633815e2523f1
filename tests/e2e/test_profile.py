"""`pdserve profile` on a real cluster whose steps take a known time."""

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from deploy.local import LocalCluster
from deploy.profiling import profile_cluster
from pdserve.config.cluster import ClusterSettings, DecodePool, PrefillPool, RouterPool
from pdserve.config.processes import CoefficientSettings
from pdserve.domain.errors import LocalFault
from pdserve.domain.latency import StepShape
from placement.fitted_profile import Ranks, simulation_yaml, to_json, write_profile
from placement.probing import ProbePlan
from placement.profiles import load_fitted
from placement.simulation.settings import read_config
from placement.traffic import Level

TRUE = CoefficientSettings(
    fixed_s=0.02, prefill_token_s=2e-4, decode_token_s=1e-3, decode_context_token_s=4e-6
)


def settings(num_prefill: int = 1) -> ClusterSettings:
    return ClusterSettings(
        engine="timed",
        coefficients=TRUE,
        router=RouterPool(port=0, internal_port=0),
        prefill=PrefillPool(replicas=num_prefill),
        decode=DecodePool(replicas=1),
        log_level="error",
    )


async def test_profile_finds_the_times_that_the_engine_takes(tmp_path: Path) -> None:
    heard: list[str] = []
    async with LocalCluster.start(settings()) as cluster, asyncio.timeout(120):
        plan = ProbePlan(num_rounds=1, max_batch=4, levels=(Level(0.5, 4, 16),))
        profile = await profile_cluster(cluster.internal_address, plan, heard.append)
    true = TRUE.to_coefficients()
    prompt, batch = StepShape.of([(0, 400)]), StepShape.of((), [300] * 4)
    # A busy machine only adds time, and steps are long enough that it adds little.
    assert profile.prefill.step_s(prompt) == pytest.approx(true.step_s(prompt), rel=0.3)
    assert profile.decode.step_s(batch) == pytest.approx(true.step_s(batch), rel=0.3)
    assert 0 < profile.handoff.handoff_s < 0.2
    # Its steps sleep, so that they do not slow each other as those do that compute.
    assert 0.7 < profile.serving.prefill < 1.3
    assert 1.0 <= profile.serving.beside_prefill < 1.3
    assert profile.limits.decode_kv_tokens == 1024 * 16
    assert {each.phase for each in profile.residuals} == {"prefill", "decode"}
    assert any("prompts of" in text for text in heard)
    json.dumps(to_json(profile), allow_nan=False)
    write_profile(profile, tmp_path / "p.json")
    assert load_fitted(str(tmp_path / "p.json"), profile.model) == profile
    (tmp_path / "sim.yaml").write_text(simulation_yaml(profile, "p.json"))
    config = read_config(tmp_path / "sim.yaml")
    assert config.pdserve == profile.options()


async def test_loss_of_a_worker_meanwhile_is_told() -> None:
    plan = ProbePlan(num_rounds=1, max_batch=4)
    async with LocalCluster.start(settings()) as cluster, asyncio.timeout(120):

        def kill_decode(text: str) -> None:
            if "prompts of" in text:
                worker = cluster.process("decode-0")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)

        with pytest.raises(LocalFault, match="a request of the profile"):
            await profile_cluster(cluster.internal_address, plan, kill_decode)


@pytest.mark.slow
async def test_profile_of_ranks_is_of_what_they_take_together(tmp_path: Path) -> None:
    ranked = ClusterSettings(
        num_blocks=512,
        router=RouterPool(port=0, internal_port=0),
        prefill=PrefillPool(replicas=1, tp=2),
        decode=DecodePool(replicas=1),
        log_level="error",
    )
    async with LocalCluster.start(ranked) as cluster, asyncio.timeout(900):
        plan = ProbePlan(num_rounds=1, max_batch=2, levels=(Level(0.5, 4, 16),))
        profile = await profile_cluster(cluster.internal_address, plan, lambda text: None)
    assert (profile.prefill_ranks, profile.decode_ranks) == (Ranks(tp=2), Ranks())
    # Two sums over sockets for each of the demo model's layers, at the least.
    assert profile.prefill.step_s(StepShape.of([(0, 100)])) > 1e-3
    write_profile(profile, tmp_path / "p.json")
    assert load_fitted(str(tmp_path / "p.json"), profile.model) == profile
    (tmp_path / "sim.yaml").write_text(simulation_yaml(profile, "p.json"))
    assert [pool.tp for pool in read_config(tmp_path / "sim.yaml").pools] == [2, 1]


async def test_cluster_without_prefill_workers_is_told() -> None:
    async with LocalCluster.start(settings(num_prefill=0)) as cluster:
        with pytest.raises(LocalFault, match="no prefill worker"):
            await profile_cluster(cluster.internal_address, ProbePlan(), lambda text: None)


async def test_cluster_whose_limits_refuse_a_probe_is_told() -> None:
    limited = settings().model_copy(
        update={"router": RouterPool(port=0, internal_port=0, max_wait_s=0.05)}
    )
    plan = ProbePlan(num_rounds=1, max_batch=4)
    async with LocalCluster.start(limited) as cluster, asyncio.timeout(120):
        with pytest.raises(LocalFault, match=r"refused a request of the profile: .*0\.05 s"):
            await profile_cluster(cluster.internal_address, plan, lambda text: None)
