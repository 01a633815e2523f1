"""Measuring the links of a cluster that serves, by handing real prompts from worker to worker.

Each pair gets a few requests of this tool's own, straight at the decode worker, as a router sends
them: prompts of one token for the latency, and of one engine step for the rate. Their tokens are
drawn anew, so that no cache knows them. What is measured is from the first block asked for to the
last one checked.
"""

import asyncio
import contextlib
import secrets
import statistics
from collections.abc import AsyncIterator
from dataclasses import replace
from random import Random

from deploy.link_check.links import Link, Side
from pdserve.client.admin import AdminClient
from pdserve.config.timers import Timers
from pdserve.domain.errors import LocalFault, PdserveError, PeerFault, Reason
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch, RequestId
from pdserve.domain.kv_exchange import exchange_obstacle
from pdserve.domain.messages import (
    PeerHello,
    PrefillTarget,
    Reads,
    Role,
    StepOutputs,
    Submit,
    WorkerHello,
    WorkerState,
)
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Completed, Failed, PhaseTimeline
from pdserve.rpc.links import connect_decode
from pdserve.rpc.streams import DecodeLink

PROBE_S = 30.0
NUM_PROBES = 5  # of either kind for a pair
REPORT_S, POLL_S = 10.0, 0.1  # until every worker has reported again
MAX_TOKENS = 2  # an answer of one token needs no KV
USABLE = ("alive", "suspect")


class ProbeFailed(PdserveError):
    """A worker did not do what it was asked; the message says what."""


async def measure_cluster(address: str) -> list[Link]:
    """Of the router at `address`, its internal one; raises `PdserveError` if it cannot be asked."""
    async with AdminClient(address) as admin:
        workers = await _workers(admin)
        prefill = [each for each in workers if each.hello.role is Role.PREFILL]
        decode = [each for each in workers if each.hello.reads is Reads.NONE]
        if not (prefill and decode):
            raise LocalFault(
                f"nothing hands KV on at {address}: it has {len(prefill)} prefill workers, and "
                f"{len(decode)} decode workers that take from them"
            )
        links = []
        for target in decode:
            links += await _measure_worker(target, prefill)
        return await _with_paths(admin, links)


async def _measure_worker(target: WorkerState, prefill: list[WorkerState]) -> list[Link]:
    """From all prefill workers to one decode worker."""
    links = [Link(prefill=_side(source.hello), decode=_side(target.hello)) for source in prefill]
    try:
        async with _stream_to(target.hello) as stream:
            return [
                await _measured(link, stream, source, target)
                for link, source in zip(links, prefill, strict=True)
            ]
    except PdserveError as error:
        return [replace(link, failure=error.message) for link in links]


def _side(hello: WorkerHello) -> Side:
    return Side(name=hello.worker_id, protocol_version=hello.protocol_version, layout=hello.layout)


@contextlib.asynccontextmanager
async def _stream_to(hello: WorkerHello) -> AsyncIterator[DecodeLink]:
    """A stream to the decode worker in the life that the router knows."""
    timers = Timers()
    stream = await connect_decode(hello.address, timers)
    try:
        epoch = Epoch(secrets.randbits(63))
        me = PeerHello(peer_id="check-links", epoch=epoch, protocol_version=PROTOCOL_VERSION)
        await stream.send(me)
        try:
            async with asyncio.timeout(timers.connect_s):
                theirs = await stream.receive()
        except TimeoutError:
            raise ProbeFailed(f"{hello.worker_id} at {hello.address} does not answer") from None
        if not isinstance(theirs, PeerHello) or theirs.epoch != hello.epoch:
            raise PeerFault(f"{hello.worker_id} has restarted", reason=Reason.FENCED)
        yield stream
    finally:
        await stream.close()


async def _measured(
    link: Link, stream: DecodeLink, source: WorkerState, target: WorkerState
) -> Link:
    for each in (source, target):
        if each.health not in USABLE:
            return replace(link, failure=f"{each.hello.worker_id} is {each.health}")
    if (obstacle := exchange_obstacle(target.hello, source.hello)) is not None:
        return replace(link, failure=obstacle)
    longest = min(
        *(each.hello.max_context_tokens - MAX_TOKENS for each in (source, target)),
        *(each.hello.num_blocks * each.hello.block_size - MAX_TOKENS for each in (source, target)),
        source.hello.max_step_tokens,
    )
    try:
        short = [await _probe(stream, source, target, 1) for _ in range(NUM_PROBES)]
        long = [await _probe(stream, source, target, longest) for _ in range(NUM_PROBES)]
    except PdserveError as error:
        return replace(link, failure=error.message)
    return replace(
        link,
        num_bytes=sum(each.transferred_bytes for each in long),
        bytes_per_s=statistics.median(
            each.transferred_bytes / max(each.transfer_s, 1e-9) for each in long
        ),
        latency_s=statistics.median(each.transfer_s for each in short),
    )


async def _probe(
    stream: DecodeLink, source: WorkerState, target: WorkerState, num_tokens: int
) -> PhaseTimeline:
    """One request whose prompt `source` reads; raises `PdserveError` if its KV did not arrive."""
    rng = Random(secrets.randbits(64))
    submit = Submit(
        request_id=RequestId(f"check-links-{secrets.token_hex(8)}"),
        attempt=1,
        prompt_token_ids=tuple(rng.randrange(source.hello.vocab_size) for _ in range(num_tokens)),
        sampling=SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
        deadline_s=PROBE_S,
        prefill_targets=(
            PrefillTarget(
                worker_id=source.hello.worker_id,
                address=source.hello.address,
                epoch=source.hello.epoch,
            ),
        ),
    )
    await stream.send(submit)
    try:
        async with asyncio.timeout(PROBE_S):
            end = await _end_of(stream, submit.request_id)
    except TimeoutError:
        raise ProbeFailed(f"no answer within {PROBE_S:g} s") from None
    if isinstance(end, Failed):
        raise ProbeFailed(end.message)
    if end.timeline.transferred_bytes == 0:
        raise ProbeFailed(
            f"{target.hello.worker_id} got nothing from {source.hello.worker_id} and read the "
            "prompt itself; its log says why"
        )
    return end.timeline


async def _end_of(stream: DecodeLink, request_id: RequestId) -> Completed | Failed:
    while True:
        message = await stream.receive()
        if isinstance(message, StepOutputs):
            for output in message.outputs:
                if output.request_id == request_id and output.end is not None:
                    return output.end


async def _with_paths(admin: AdminClient, links: list[Link]) -> list[Link]:
    """How each was read, as the decode worker says in a report that is newer than the reads."""
    before = {each.hello.worker_id: each.load.sequence for each in await _workers(admin)}
    deadline_s = asyncio.get_running_loop().time() + REPORT_S
    while True:
        workers = {each.hello.worker_id: each for each in await _workers(admin)}
        is_fresh = all(
            workers[name].load.sequence >= sequence + 2
            for name, sequence in before.items()
            if name in workers and workers[name].health in USABLE
        )
        if is_fresh or asyncio.get_running_loop().time() > deadline_s:
            break
        await asyncio.sleep(POLL_S)
    paths = {
        (str(path.worker_id), str(each.hello.worker_id)): path
        for each in workers.values()
        for path in each.load.kv_paths
    }
    return [
        replace(link, transport=path.transport, why=path.why)
        if (path := paths.get((link.prefill.name, link.decode.name)))
        else link
        for link in links
    ]


async def _workers(admin: AdminClient) -> tuple[WorkerState, ...]:
    return (await admin.cluster_state()).workers
