"""Measuring the links of a deployment on this machine, before it serves.

Each pool stands for its workers: its ranks are processes with a little KV memory of the model's
layout, and no model. A pair of pools is measured alone, all ranks of the decode side at once.
"""

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from deploy.deployment import Deployment, PlacedWorker
from deploy.link_check.links import Link, Side
from deploy.link_check.rank import MAX_LINE_BYTES, layout_fields
from pdserve.config.processes import WorkerSettings
from pdserve.domain.errors import LocalFault, PdserveError
from pdserve.domain.ids import PROTOCOL_VERSION
from pdserve.domain.kv_demand import num_blocks_for
from pdserve.domain.layout import BlockOrder, ShardedLayout
from pdserve.domain.messages import Reads, Role
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_shape import kv_layout

START_S = 120.0
MEASURE_S = 120.0
MIN_BLOCKS = 4


class RankFailed(PdserveError):
    """A process that stands for a rank ended, or does not answer; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Workers that move KV alike."""

    settings: WorkerSettings  # of the first one
    names: tuple[str, ...]
    layout: ShardedLayout

    @property
    def side(self) -> Side:
        first, *others = self.names
        name = f"{first} to {others[-1]}" if others else first
        return Side(name=name, protocol_version=PROTOCOL_VERSION, layout=self.layout)


async def measure_deployment(deployment: Deployment, size_bytes: int) -> list[Link]:
    """Raises `LocalFault` if nothing of it hands KV on, or if its model cannot be read."""
    pools = pools_of(deployment)
    prefill = [pool for pool in pools if pool.settings.role is Role.PREFILL]
    decode = [pool for pool in pools if pool.settings.role is Role.DECODE]
    if not (prefill and decode):
        raise LocalFault("nothing hands KV on here: every worker reads the prompts that it answers")
    return [await _measure(source, target, size_bytes) for source in prefill for target in decode]


def pools_of(deployment: Deployment) -> list[Pool]:
    files = ModelFiles.open(deployment.router.model, _override(deployment.workers))
    alike: dict[str, list[WorkerSettings]] = {}
    for worker in deployment.workers:
        settings = worker.settings
        if settings.reads is not Reads.OWN:
            alike.setdefault(_kind(settings), []).append(settings)
    found = []
    for pool in alike.values():
        engine = pool[0].engine
        whole = kv_layout(files.config, block_size=engine.block_size, dtype=engine.dtype)
        whole = replace(whole, order=BlockOrder(engine.block_order))
        is_divided = engine.engine != "timed"
        try:
            layout = ShardedLayout(
                whole=whole,
                tp=engine.tp if is_divided else 1,
                pp=engine.pp if is_divided else 1,
            )
        except ValueError as error:
            raise LocalFault(
                f"{pool[0].worker_id}: tp {engine.tp}, pp {engine.pp}: {error}"
            ) from None
        names = tuple(each.worker_id for each in pool)
        found.append(Pool(settings=pool[0], names=names, layout=layout))
    return found


def _override(workers: Sequence[PlacedWorker]) -> Any:
    return workers[0].settings.engine.override_config if workers else None


def _kind(settings: WorkerSettings) -> str:
    """What decides how a worker moves KV, as text."""
    engine = settings.engine
    return json.dumps(
        [
            settings.role,
            settings.transports,
            engine.engine,
            engine.dtype,
            engine.block_size,
            engine.block_order,
            engine.tp,
            engine.pp,
            len(settings.cpus),
        ]
    )


async def _measure(source: Pool, target: Pool, size_bytes: int) -> Link:
    link = Link(
        prefill=source.side,
        decode=target.side,
        num_pairs=len(source.names) * len(target.names),
    )
    try:
        return await _measured(link, source, target, size_bytes)
    except PdserveError as error:
        return replace(link, failure=error.message)


async def _measured(link: Link, source: Pool, target: Pool, size_bytes: int) -> Link:
    sizes = [each.layout.whole.block_size for each in (source, target)]
    count = max(MIN_BLOCKS, size_bytes // source.layout.block_bytes)
    num_own = num_blocks_for(count * sizes[0], sizes[1])
    async with contextlib.AsyncExitStack() as stack:
        givers = await _started(stack, source, count)
        takers = await _started(stack, target, num_own)
        said = await asyncio.gather(*(rank.hear(START_S) for rank in givers))
        await asyncio.gather(*(rank.hear(START_S) for rank in takers))
        digests = [each["digests"] for each in said]
        peer = {
            "layout": layout_fields(source.layout),
            "regions": [region for each in said for region in each["regions"]],
            "digests": ["".join(ranks) for ranks in zip(*digests, strict=True)],
        }
        for rank in takers:
            await rank.tell(peer)
        found = await asyncio.gather(*(rank.hear(MEASURE_S) for rank in takers))
    failures = [each["failure"] for each in found if "failure" in each]
    if failures:
        return replace(link, failure=failures[0])
    return replace(
        link,
        transport=found[0]["transport"],
        why=found[0]["why"],
        num_bytes=sum(each["num_bytes"] for each in found),
        bytes_per_s=sum(each["num_bytes"] / each["elapsed_s"] for each in found),
        latency_s=max(each["latency_s"] for each in found),
    )


async def _started(
    stack: contextlib.AsyncExitStack, pool: Pool, num_blocks: int
) -> list["RankProcess"]:
    """The ranks of one worker of a pool; they end with the stack."""
    # Its own ports and logs are for when it serves.
    settings = pool.settings.model_copy(update={"kv_port": 0, "log_file": ""})
    ranks = []
    for rank in range(pool.layout.num_ranks):
        process = await stack.enter_async_context(rank_process(f"{pool.names[0]} rank {rank}"))
        await process.tell(
            {
                "settings": settings.model_dump(mode="json"),
                "layout": layout_fields(pool.layout),
                "rank": rank,
                "num_blocks": num_blocks,
                "epoch": 1 + (settings.role is Role.DECODE),
            }
        )
        ranks.append(process)
    return ranks


class RankProcess:
    """A process that speaks lines of JSON."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, errors: IO[bytes]) -> None:
        self._name = name
        self._process = process
        self._errors = errors

    async def tell(self, message: Mapping[str, Any]) -> None:
        """Raises `RankFailed` if it is gone."""
        stdin = self._process.stdin
        if stdin is None:
            raise RankFailed(f"{self._name} has no input")
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            await stdin.drain()
        except OSError:
            raise RankFailed(self._last_words()) from None

    async def hear(self, within_s: float) -> dict[str, Any]:
        """Its next line; raises `RankFailed` if there is none."""
        stdout = self._process.stdout
        if stdout is None:
            raise RankFailed(f"{self._name} has no output")
        try:
            async with asyncio.timeout(within_s):
                line = await stdout.readline()
        except TimeoutError:
            raise RankFailed(f"{self._name} said nothing for {within_s:g} s") from None
        if not line:
            raise RankFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{self._name} ended: {words[-1] if words else 'without a word'}"


@contextlib.asynccontextmanager
async def rank_process(name: str) -> AsyncIterator[RankProcess]:
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "deploy.link_check.rank",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=MAX_LINE_BYTES,
        )
        try:
            yield RankProcess(name, process, errors)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
