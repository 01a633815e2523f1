"""Open-loop load: requests leave at their planned times, whatever became of earlier ones."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from pdserve.client.faults import failure_name
from pdserve.client.inference import InferenceClient
from pdserve.client.statistics import RequestRecord
from pdserve.client.values import Chunk, Model, Sampling
from pdserve.client.workload import TraceRequest, make_prompt
from pdserve.domain.errors import LocalFault, PdserveError

NUM_CONNECTIONS = 4
"""Servers bound the streams of one connection; beyond that bound a request would wait here."""

Progress = Callable[[RequestRecord], None]


async def run_load(
    address: str,
    model: Model,
    requests: Sequence[TraceRequest],
    *,
    seed: int = 0,
    timeout_s: float | None = None,
    slo_class: str = "",
    progress: Progress = lambda record: None,
) -> tuple[list[RequestRecord], float]:
    """Send `requests` and return a record of each, in their order, and the run's duration.

    Answers have exactly the planned number of tokens; `progress` hears of each request that ended.
    """
    sender = _Sender(model, seed, timeout_s, slo_class)
    records: list[RequestRecord] = []

    async def send(client: InferenceClient, index: int, request: TraceRequest) -> None:
        record = await sender.send(client, index, request)
        records.append(record)
        progress(record)

    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(InferenceClient(address))
            for _ in range(NUM_CONNECTIONS)
        ]
        await asyncio.gather(*(client.list_models() for client in clients))  # connects them
        sender.start = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for index, request in enumerate(requests):
                await _sleep_until(sender.start + request.arrival_s)
                tasks.create_task(send(clients[index % len(clients)], index, request))
        duration_s = time.monotonic() - sender.start
    return sorted(records, key=lambda record: record.index), duration_s


async def only_model(client: InferenceClient, name: str = "") -> Model:
    """The served model called `name`, or the only one; raises `LocalFault` naming the choices."""
    models = await client.list_models()
    chosen = [model for model in models if name in ("", model.name)]
    if len(chosen) != 1:
        served = ", ".join(model.name for model in models) or "none"
        raise LocalFault(f"model {name or 'not named'}: served are {served}")
    return chosen[0]


class _Sender:
    """Sends one request at a time of a run and measures it."""

    def __init__(self, model: Model, seed: int, timeout_s: float | None, slo_class: str) -> None:
        self.start = 0.0
        self._model = model
        self._seed = seed
        self._timeout_s = timeout_s
        self._slo_class = slo_class

    async def send(
        self, client: InferenceClient, index: int, request: TraceRequest
    ) -> RequestRecord:
        planned = self.start + request.arrival_s
        # One seed for each request of each run, without a collision between neighbouring seeds.
        prompt = make_prompt(
            request.prompt_tokens,
            vocab_size=self._model.vocab_size,
            seed=self._seed * 1_000_003 + index,
        )
        sampling = Sampling(max_tokens=request.output_tokens, ignore_eos=True)
        late_s = time.monotonic() - planned
        times: list[tuple[float, int]] = []  # when, and how many tokens came
        last, failure = Chunk(first_index=0), ""
        stream = client.generate(
            prompt,
            sampling,
            model=self._model.name,
            slo_class=self._slo_class,
            timeout_s=self._timeout_s,
        )
        try:
            async with contextlib.aclosing(stream):
                async for last in stream:
                    if last.tokens:
                        times.append((time.monotonic(), len(last.tokens)))
        except PdserveError as error:
            failure = failure_name(error)
        return RequestRecord(
            index=index,
            arrival_s=request.arrival_s,
            prompt_tokens=request.prompt_tokens,
            late_s=late_s,
            ttft_s=times[0][0] - planned if times else None,
            tpot_s=mean_gap_s(times),
            e2e_s=time.monotonic() - planned,
            output_tokens=sum(count for _, count in times),
            timeline=last.finished.timeline if last.finished else None,
            failure=failure,
        )


def mean_gap_s(times: Sequence[tuple[float, int]]) -> float | None:
    """Mean time between tokens after the first; `times`: when each chunk came, with its tokens."""
    num_gaps = sum(count for _, count in times) - 1
    return (times[-1][0] - times[0][0]) / num_gaps if num_gaps > 0 else None


async def _sleep_until(when: float) -> None:
    """Always yields once, so that requests due together leave one by one."""
    await asyncio.sleep(max(0.0, when - time.monotonic()))
