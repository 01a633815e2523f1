"""A whole cluster on virtual time: the router and the workers that serve, joined in memory."""

import asyncio
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import yaml

from deploy.deployment import Deployment
from deploy.opening import read_deployment
from deploy.simulated.cluster import SimulatedCluster, open_simulated_cluster
from deploy.simulated.virtual_time import run_virtual
from pdserve.domain.sampling import SamplingParams
from pdserve.engine.opening import open_engine
from router.requests import Chunk, GenerateCall
from tests.support.plans import STEP_TIMES, plan, pool
from tests.support.timed_oracle import timed_tokens
from tests.support.worker_pair import demo_tokenizer

NUM_REQUESTS = 200
BLOCK_SIZE = 8


@dataclass(frozen=True, slots=True)
class Answer:
    prompt: tuple[int, ...]
    sampling: SamplingParams
    tokens: tuple[int, ...]
    text: str
    reader: str
    writer: str


def deployment_of(tmp_path: Path) -> Deployment:
    pools = [
        pool(role, 2, kv_tokens=kv_tokens, step_times={**STEP_TIMES, "fixed_s": 0.01})
        for role, kv_tokens in (("prefill", 800), ("decode", 1600))
    ]
    data = plan(block_size=BLOCK_SIZE, pools=pools)
    data["limits"] |= {"max_step_tokens": 24, "max_rate": 0.0}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return read_deployment(path, {"engine": "timed"}, [])


async def ask(cluster: SimulatedCluster, number: int, rng: Random) -> Answer:
    """One request at a random moment. Some share beginnings, some have text for a prompt."""
    sampling = SamplingParams(
        max_tokens=rng.randint(1, 12), temperature=rng.choice([0.0, 1.0]), seed=number
    )
    shared = tuple(range(100, 100 + 9 * rng.randint(0, 4)))
    own = tuple(rng.randrange(20, 1500) for _ in range(rng.randint(1, 40)))
    text = f"def f{number}(x):" if rng.random() < 0.2 else ""
    chunks: list[Chunk] = []

    async def take(chunk: Chunk) -> None:
        chunks.append(chunk)

    await asyncio.sleep(rng.uniform(0, 4.0))
    call = GenerateCall(
        prompt=text or shared + own, sampling=sampling, has_seed=True, label=f"r{number}"
    )
    timeline = (await cluster.router.dispatcher.run(call, take)).timeline
    return Answer(
        prompt=demo_tokenizer().encode(text) if text else shared + own,
        sampling=sampling,
        tokens=tuple(token.token_id for chunk in chunks for token in chunk.tokens),
        text="".join(chunk.text for chunk in chunks),
        reader=timeline.prefill_worker,
        writer=timeline.decode_worker,
    )


async def served(deployment: Deployment, seed: int) -> list[Answer]:
    rngs = [Random(f"{seed}.{number}") for number in range(NUM_REQUESTS)]
    async with open_simulated_cluster(deployment, seed=seed) as cluster:
        answers = await asyncio.gather(
            *(ask(cluster, number, rng) for number, rng in enumerate(rngs))
        )
        await asyncio.sleep(1.0)  # a heartbeat
        assert cluster.router.ledger.is_empty
        state = cluster.router.state()
        assert (state.num_completed, state.num_in_flight) == (NUM_REQUESTS, 0)
        prefill, decode = cluster.prefill.values(), cluster.decode.values()
        for kv in (*(each.pool for each in prefill), *(each.pool for each in decode)):
            assert kv.usage().is_idle
    return answers


@pytest.mark.parametrize("seed", range(3))
def test_cluster_of_the_products_builders_answers_exactly(tmp_path: Path, seed: int) -> None:
    """On virtual time, callbacks in random order; the oracle knows nothing of blocks."""
    deployment = deployment_of(tmp_path)
    answers = run_virtual(served(deployment, seed), seed=seed)
    spec = open_engine(deployment.workers[0].settings.engine).spec
    for answer in answers:
        params = answer.sampling
        tokens = timed_tokens(answer.prompt, params.max_tokens, spec=spec, params=params)
        assert answer.tokens == tokens
        assert answer.text == demo_tokenizer().decode(tokens)
    assert {answer.reader for answer in answers} >= {"prefill-0", "prefill-1"}
    assert {answer.writer for answer in answers} == {"decode-0", "decode-1"}


def test_the_same_seed_serves_the_same_way_twice(tmp_path: Path) -> None:
    deployment = deployment_of(tmp_path)
    assert run_virtual(served(deployment, 7), seed=7) == run_virtual(served(deployment, 7), seed=7)


def test_no_grpc_is_loaded_for_it() -> None:
    loaded = "import sys, deploy.simulated.cluster; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True
    ).stdout
    assert not {"grpc", "google"} & {name.partition(".")[0] for name in output.split()}
