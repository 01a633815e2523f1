"""A plain Python event loop with DistServe's rules: the peer that ours is measured and checked by.

Written from the reference's MODEL.md and not from our kernels: objects, deques and a heap of
callbacks, each step of each stage an event. Times in ms.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from placement.simulation.timing import DistserveTiming

MAX_DECODE_TOKENS = 50_000


@dataclass(slots=True)
class PeerRequest:
    number: int
    prompt: int
    output: int
    arrival_ms: float
    num_done: int = 0
    batch: object = None
    first_ms: float = -1.0
    last_ms: float = -1.0
    prefill: int = -1
    decode: int = -1

    @property
    def context(self) -> int:
        return self.prompt + self.num_done


@dataclass(slots=True)
class Loop:
    """Callbacks by time, then in the order in which they were scheduled."""

    now_ms: float = 0.0
    heap: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    num_scheduled: int = 0

    def at(self, time_ms: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (time_ms, self.num_scheduled, call))
        self.num_scheduled += 1

    def run(self) -> None:
        while self.heap:
            self.now_ms, _, call = heapq.heappop(self.heap)
            call()


class Stage:
    """One pipeline stage: reads prompts first, decodes when there are none."""

    def __init__(
        self, loop: Loop, timing: DistserveTiming, instance: int, rank: int, depth: int
    ) -> None:
        self.loop, self.timing, self.instance = loop, timing, instance
        self.is_first, self.is_last, self.depth = rank == 0, rank == depth - 1, depth
        self.following: Stage = self
        self.prompts: deque[PeerRequest] = deque()
        self.decodes: deque[PeerRequest] = deque()
        self.num_reading = 0
        self.is_idle = True
        self.on_read: Callable[[PeerRequest], None] = self.keep

    def keep(self, request: PeerRequest) -> None:
        """Decode where it was read (colocated)."""
        request.decode = self.instance
        self.following.add_decodes([request])

    def add_prompt(self, request: PeerRequest) -> None:
        self.prompts.append(request)
        self.wake()

    def add_decodes(self, requests: Sequence[PeerRequest]) -> None:
        self.decodes.extend(requests)
        if requests:
            self.wake()

    def wake(self) -> None:
        if self.is_idle:
            self.is_idle = False
            self.loop.at(self.loop.now_ms, self.start)

    def start(self) -> None:
        if self.prompts:
            self.start_reading()
        elif self.decodes:
            self.start_decoding()
        else:
            self.is_idle = True

    def start_reading(self) -> None:
        batch: list[PeerRequest] = []
        if self.is_first:
            budget, mark = self.timing.max_num_tokens, object()
            while self.prompts and self.prompts[0].prompt <= budget:
                request = self.prompts.popleft()
                budget -= request.prompt
                request.batch = mark
                batch.append(request)
        else:
            mark = self.prompts[0].batch
            while self.prompts and self.prompts[0].batch is mark:
                batch.append(self.prompts.popleft())
        a, b, c = self.timing.prefill
        tokens = sum(request.prompt for request in batch)
        span = (a + b * tokens + c * sum(r.prompt**2 for r in batch)) / self.depth + self.depth
        self.num_reading = len(batch)
        self.loop.at(self.loop.now_ms + span + self.overhead(tokens), lambda: self.read(batch))

    def read(self, batch: list[PeerRequest]) -> None:
        self.num_reading = 0
        for request in batch:
            if not self.is_last:
                self.following.add_prompt(request)
                continue
            request.first_ms = self.loop.now_ms
            if request.output == 0:
                request.last_ms = self.loop.now_ms
            else:
                self.on_read(request)
        self.start()

    def start_decoding(self) -> None:
        batch: list[PeerRequest] = []
        budget = MAX_DECODE_TOKENS
        while self.decodes and self.decodes[0].context + 1 <= budget:
            request = self.decodes.popleft()
            budget -= request.context + 1
            batch.append(request)
        context = sum(request.context for request in batch)
        is_small = len(batch) < self.timing.threshold
        a, b, c = self.timing.decode_small if is_small else self.timing.decode_large
        span = (a + b * (context + len(batch)) + c * len(batch)) / self.depth
        self.loop.at(self.loop.now_ms + span + self.overhead(context), lambda: self.decoded(batch))

    def decoded(self, batch: list[PeerRequest]) -> None:
        rest = []
        for request in batch:
            request.num_done += self.is_last
            if request.num_done == request.output:
                request.last_ms = self.loop.now_ms
            else:
                rest.append(request)
        self.following.add_decodes(rest)
        self.start()

    def overhead(self, tokens: int) -> float:
        return 2 + 0.0001 * tokens if self.is_first else 0.0


def run_event_loop(
    requests: Sequence[PeerRequest],
    readers: Sequence[tuple[DistserveTiming, int]],
    writers: Sequence[tuple[DistserveTiming, int]],
) -> None:
    """Serve `requests` on instances given as (timing, pipeline depth); no writers: colocated."""
    loop = Loop()
    instances = [
        [Stage(loop, timing, number, rank, depth) for rank in range(depth)]
        for number, (timing, depth) in enumerate([*readers, *writers])
    ]
    for stages in instances:
        for stage, following in zip(stages, [*stages[1:], stages[0]], strict=True):
            stage.following = following
    heads = [stages[0] for stages in instances[: len(readers)]]
    decode_heads = [stages[0] for stages in instances[len(readers) :]]

    def dispatch(request: PeerRequest) -> None:
        head = min(heads, key=lambda stage: stage.num_reading + len(stage.prompts))
        request.prefill = head.instance
        head.add_prompt(request)

    def dispatch_decode(request: PeerRequest) -> None:
        head = min(decode_heads, key=lambda stage: len(stage.decodes))
        request.decode = head.instance
        head.add_decodes([request])

    for stages in instances[: len(readers)] if writers else []:
        stages[-1].on_read = dispatch_decode
    for request in requests:
        loop.at(request.arrival_ms, lambda request=request: dispatch(request))  # type: ignore[misc]
    loop.run()
