"""What three real processes expose is what the table says, and its numbers add up."""

import asyncio
import contextlib
import re
import signal
import urllib.request
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from deploy.processes import LocalProcess
from pdserve.client.admin import AdminClient
from pdserve.client.inference import InferenceClient
from pdserve.client.values import Sampling
from pdserve.config.base import parse_settings
from pdserve.config.cluster import ClusterSettings
from pdserve.domain.errors import BadRequest, Reason, Refused
from pdserve.observe.metrics import METRICS, Kind, Process
from tests.support.clusters import ANY_COEFFICIENTS

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "metrics.md"
BLOCK_SIZE = 16
PROMPT_TOKENS = 40  # two blocks and a half
NUM_OUTPUT = 6
LONG_PROMPT = tuple(range(100, 100 + PROMPT_TOKENS))

Scrape = Mapping[str, Metric]
"""Families by the name that Prometheus stores."""


def settings(log_dir: Path) -> ClusterSettings:
    data = {
        "engine": "timed",
        # Slow enough that a request is still there when the next one is sent.
        "coefficients": {**ANY_COEFFICIENTS, "decode_token_s": 0.01},
        "block_size": BLOCK_SIZE,
        "log_dir": str(log_dir),
        "router": {
            "port": 0,
            "internal_port": 0,
            "max_num_requests": 2,
            "slo": [
                {"name": "chat", "ttft_s": 60, "tpot_s": 60},
                {"name": "instant", "ttft_s": 1e-6, "tpot_s": 60, "attainment": 0.5},
            ],
        },
        "decode": {"max_local_prefill_tokens": 8},
    }
    return parse_settings(ClusterSettings, data, source="test")


class Processes:
    """A router, a prefill and a decode worker, each its own process."""

    def __init__(self, by_role: Mapping[Process, LocalProcess]) -> None:
        self.by_role = by_role
        router = by_role[Process.ROUTER].ready
        assert router is not None
        self.public_address = router.address
        self.internal_address = router.internal_address

    async def scrape(self, process: Process) -> Scrape:
        ready = self.by_role[process].ready
        assert ready is not None
        url = f"http://{ready.metrics_address}/metrics"
        text = await asyncio.to_thread(fetch, url)
        return {
            family.name + ("_total" if family.type == "counter" else ""): family
            for family in text_string_to_metric_families(text)
        }


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        body: bytes = reply.read()
    return body.decode()


@contextlib.asynccontextmanager
async def processes(log_dir: Path) -> AsyncIterator[Processes]:
    cluster = settings(log_dir)
    router = LocalProcess("router", "router", cluster.router_settings(), log_dir / "router.log")
    started = [router]
    try:
        ready = await router.start()
        for each in cluster.worker_settings(ready.internal_address):
            log_path = log_dir / f"{each.worker_id}.log"
            started.append(LocalProcess(each.worker_id, each.role, each, log_path))
        await asyncio.gather(*(worker.start() for worker in started[1:]))
        async with AdminClient(ready.internal_address) as admin, asyncio.timeout(30):
            while True:
                workers = (await admin.cluster_state()).workers
                if [worker.health for worker in workers] == ["alive", "alive"]:
                    break
                await asyncio.sleep(0.05)
        yield Processes({Process(each.role): each for each in started})
    finally:
        for process in started:
            process.signal(signal.SIGTERM)
        await asyncio.gather(*(process.wait() for process in started))


def value(scrape: Scrape, family: str, suffix: str = "", **labels: str) -> float:
    """The sum of the family's samples that have these labels."""
    name = family + suffix
    found = [
        sample.value
        for sample in scrape[family].samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert found, (name, labels)
    return sum(found)


def shape(scrape: Scrape) -> set[tuple[str, str, tuple[str, ...]]]:
    """Name, type and label names of what was emitted; a family without samples has no labels."""
    return {
        (name, family.type, labels)
        for name, family in scrape.items()
        for labels in {tuple(sorted(sample.labels.keys() - {"le"})) for sample in family.samples}
    }


def documented(process: Process) -> set[tuple[str, str, tuple[str, ...]]]:
    """The rows of docs/metrics.md for this kind of process."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    return {
        (name, kind, tuple(sorted(re.findall(r"\w+", labels))))
        for name, kind, labels, processes in rows
        if {"all", process} & set(re.findall(r"\w+", processes))
    }


async def ask(client: InferenceClient, prompt: Iterable[int], **more: Any) -> None:
    sampling = Sampling(max_tokens=NUM_OUTPUT, ignore_eos=True)
    await client.complete(tuple(prompt), sampling, **more)


async def until_handoffs_end(cluster: Processes) -> None:
    """An answer may be whole before its prefill worker hears that nothing more is needed."""
    async with asyncio.timeout(10):
        while value(await cluster.scrape(Process.PREFILL), "pdserve_handoffs_open"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def refuse_one(client: InferenceClient) -> None:
    """Two requests take all places; the third is sent away."""
    slow = Sampling(max_tokens=200, ignore_eos=True)
    async with contextlib.AsyncExitStack() as stack:
        for offset in (500, 600):
            prompt = tuple(range(offset, offset + PROMPT_TOKENS))
            stream = await stack.enter_async_context(
                contextlib.aclosing(client.generate(prompt, slow))
            )
            await anext(stream)
        with pytest.raises(Refused) as caught:
            await ask(client, LONG_PROMPT)
        assert caught.value.reason is Reason.OVERLOADED


async def test_what_an_end_to_end_run_emits_is_what_the_table_says(tmp_path: Path) -> None:
    async with (
        processes(tmp_path) as cluster,
        InferenceClient(cluster.public_address) as client,
    ):
        before = await cluster.scrape(Process.ROUTER)
        assert value(before, "pdserve_refusals_total", reason="OVERLOADED") == 0
        for offset in (100, 200, 300):
            await ask(client, range(offset, offset + PROMPT_TOKENS))
        await ask(client, range(400, 400 + PROMPT_TOKENS), slo_class="instant")
        await ask(client, LONG_PROMPT)  # its whole blocks are cached at the decode worker
        with pytest.raises(BadRequest, match="chat, instant"):
            await ask(client, LONG_PROMPT, slo_class="none such")
        await until_handoffs_end(cluster)
        settled = {role: await cluster.scrape(role) for role in Process}
        check_numbers(settled, num_completed=5)

        await refuse_one(client)
        router = await cluster.scrape(Process.ROUTER)
        assert value(router, "pdserve_refusals_total", reason="OVERLOADED") == 1
        assert value(router, "pdserve_slo_requests_total", result="refused") == 1
        for role in Process:
            assert shape(await cluster.scrape(role)) == documented(role), role


def check_numbers(at: Mapping[Process, Scrape], *, num_completed: int) -> None:
    router, prefill, decode = (at[role] for role in Process)
    completed = value(router, "pdserve_requests_total", outcome="completed")
    assert completed == num_completed
    for histogram in ("ttft", "tpot", "request"):
        assert value(router, f"pdserve_{histogram}_seconds", "_count") == num_completed
    assert value(router, "pdserve_phase_seconds", "_count", phase="router_queue") == num_completed
    assert value(router, "pdserve_refusals_total", reason="INVALID_FIELD") == 1
    assert value(router, "pdserve_slo_requests_total", slo_class="chat", result="met") == 4
    assert value(router, "pdserve_slo_requests_total", slo_class="instant") == 1
    late = value(router, "pdserve_slo_requests_total", slo_class="instant", result="missed_ttft")
    assert late == 1
    for kind in ("prefill", "decode"):
        assert value(router, "pdserve_workers", role=kind, health="alive") == 1
    assert value(router, "pdserve_requests_in_flight") == 0
    assert value(router, "pdserve_requests_waiting") == 0

    for role in (prefill, decode):
        capacity = value(role, "pdserve_kv_blocks_capacity")
        assert value(role, "pdserve_kv_blocks") == capacity == 1024
        assert value(role, "pdserve_build_info") == 1
    assert value(decode, "pdserve_phase_seconds", "_count", phase="decode") == num_completed

    num_fetched = num_completed - 1  # one prompt was cached
    blocks = num_fetched * -(-PROMPT_TOKENS // BLOCK_SIZE)
    block_bytes = value(decode, "pdserve_kv_block_bytes")
    assert value(decode, "pdserve_kv_transfer_bytes_total") == blocks * block_bytes
    pair = {"prefill_worker": "prefill-0", "transport": "shm"}
    moved = {
        what: value(decode, "pdserve_kv_pair_bytes_total", **pair, what=what)
        for what in ("moved", "skipped", "retried")
    }
    assert moved == {"moved": blocks * block_bytes, "skipped": 0, "retried": 0}
    assert value(prefill, "pdserve_kv_sent_blocks_total") == blocks
    assert value(decode, "pdserve_handoffs_received_total", outcome="ok") == num_fetched
    assert value(prefill, "pdserve_handoffs_sent_total", outcome="completed") == num_fetched
    assert value(prefill, "pdserve_phase_seconds", "_count", phase="prefill") == num_fetched
    assert value(decode, "pdserve_kv_corrupt_blocks_total") == 0

    assert value(prefill, "pdserve_engine_prompt_tokens_total") == num_fetched * PROMPT_TOKENS
    cached = value(decode, "pdserve_engine_cached_tokens_total")
    assert cached == PROMPT_TOKENS // BLOCK_SIZE * BLOCK_SIZE
    assert value(decode, "pdserve_engine_prompt_tokens_total") == PROMPT_TOKENS - cached
    made = [value(role, "pdserve_engine_output_tokens_total") for role in (prefill, decode)]
    sent = value(router, "pdserve_output_tokens_total")
    assert sum(made) == sent == num_completed * NUM_OUTPUT
    for role in (prefill, decode):
        steps = value(role, "pdserve_engine_step_seconds", "_count")
        assert steps == value(role, "pdserve_engine_batch_requests", "_count") > 0


def test_the_table_is_sound() -> None:
    for process in Process:
        specs = [spec for spec in METRICS if process in spec.processes]
        assert len({spec.name for spec in specs}) == len(specs)
        for spec in specs:
            assert spec.name.endswith("_total") == (spec.kind is Kind.COUNTER), spec.name
            assert bool(spec.buckets) == (spec.kind is Kind.HISTOGRAM), spec.name
            assert list(spec.buckets) == sorted(set(spec.buckets)), spec.name
