"""Plain Python workers (rules pdserve) behind our own router: every step an event, nothing skipped.

Written for comparison with `placement.simulation.pdserve_rules`: no prefix cache. Who reads and who
writes is the router's own choice (`router.policy`), by its own account (`router.cluster_view`), of
workers that never send a report. Coefficients are the linear ones of `pdserve.domain.latency`. Of
`depth` stages each takes its part of a prefill step's time, one step after the other; a decode
batch goes through in `depth` parts.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pdserve.domain.ids import PROTOCOL_VERSION, AttemptId, Epoch, RequestId, WorkerId
from pdserve.domain.kv_demand import num_answer_kv_tokens
from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import StepCoefficients, num_attention_pairs
from pdserve.domain.messages import Reads, Role, WorkerHello, WorkerLoad
from router.cluster_view import ClusterView, Health, Ledger, RequestShape, WorkerView
from router.policy import Pair, Policy, least_total_time

HANDOFF_S = 0.002


@dataclass(slots=True)
class PlainRequest:
    number: int
    prompt: int
    output: int
    arrival_s: float = 0.0
    num_read: int = 0
    num_sent: int = 0
    num_decoded: int = 0
    first_s: float = -1.0
    end_s: float = -1.0
    reader: "PlainWorker | None" = None
    writer: "PlainWorker | None" = None

    @property
    def attempt(self) -> AttemptId:
        return AttemptId(RequestId(str(self.number)), 1)


@dataclass(slots=True)
class PlainWorker:
    number: int
    reads: bool
    writes: bool
    coefficients: StepCoefficients
    num_free: int
    max_step_tokens: int
    max_num_requests: int
    seconds_per_token: float
    depth: int = 1
    num_in_flight: int = 0  # steps of a reader's pipeline
    stage_free_s: dict[int, float] = field(default_factory=dict)
    queue: deque[PlainRequest] = field(default_factory=deque)
    waiting: deque[PlainRequest] = field(default_factory=deque)
    joining: deque[PlainRequest] = field(default_factory=deque)
    batch: list[PlainRequest] = field(default_factory=list)
    num_admitted: int = 0  # of those that hold blocks and a place
    is_busy: bool = False
    link_out_s: float = 0.0
    link_in_s: float = 0.0

    def context(self, request: PlainRequest) -> int:
        return request.prompt + 1 + request.num_decoded

    def hello(self, block_size: int) -> WorkerHello:
        reads = Reads.OTHERS if not self.writes else Reads.OWN if self.reads else Reads.NONE
        return WorkerHello(
            worker_id=WorkerId(f"w{self.number:03}"),
            role=Role.DECODE if self.writes else Role.PREFILL,
            reads=reads,
            num_stages=self.depth,
            epoch=Epoch(1),
            protocol_version=PROTOCOL_VERSION,
            address="",
            pid=0,
            model_name="",
            model_hash=b"",
            layout=None,
            tokenizer_hash=b"",
            max_context_tokens=1 << 40,
            vocab_size=2,
            block_size=block_size,
            num_blocks=self.num_free,
            block_bytes=1,
            max_num_requests=self.max_num_requests,
            max_step_tokens=self.max_step_tokens,
            engine="plain",
            coefficients=self.coefficients,
        )

    def round_s(self, tokens: int, pairs: int, num_decodes: int, context: int) -> float:
        """A step, of which each of the `depth` parts under way computes its share."""
        c = self.coefficients
        return (
            c.fixed_s
            + (c.prefill_token_s * tokens + c.prefill_attention_s * pairs) / self.depth
            + c.decode_token_s * -(-num_decodes // self.depth)
            + c.decode_context_token_s * context / self.depth
        )


class PlainCluster:
    """Serves requests at their arrival times, or `concurrency` of them at a time.

    `max_num_waiting` and `max_wait_s` are those of `router.dispatch.DispatchLimits`; a request that
    they turn away has no reader and no writer.
    """

    def __init__(
        self,
        workers: list[PlainWorker],
        block_size: int,
        *,
        policy: Policy = least_total_time,
        max_num_waiting: int = 0,
        max_wait_s: float = 0.0,
    ) -> None:
        self.workers, self.block_size = workers, block_size
        self.hellos = [worker.hello(block_size) for worker in workers]
        self.ledger = Ledger()
        self.policy = policy
        self.max_num_waiting = max_num_waiting
        self.max_wait_s = max_wait_s or float("inf")
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.now_s, self.num_scheduled = 0.0, 0
        self.later: deque[PlainRequest] = deque()

    def run(self, requests: list[PlainRequest], concurrency: int | None = None) -> None:
        first = requests if concurrency is None else requests[:concurrency]
        self.later = deque(requests[len(first) :])
        for request in first:
            self.at(request.arrival_s, lambda request=request: self.arrive(request))  # type: ignore[misc]
        while self.heap:
            self.now_s, _, call = heapq.heappop(self.heap)
            call()

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (time_s, self.num_scheduled, call))
        self.num_scheduled += 1

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def arrive(self, request: PlainRequest) -> None:
        request.arrival_s = self.now_s
        shape = RequestShape(num_prompt_tokens=request.prompt, max_tokens=request.output)
        pair = self.policy.choose(self.view(), shape, max_wait_s=self.max_wait_s)
        limit = self.max_num_waiting
        if not isinstance(pair, Pair) or (limit and self.ledger.num_unread >= limit):
            self.send_next(self.now_s)
            return
        reader = request.reader = self.workers[self.hellos.index(pair.reader.hello)]
        writer = request.writer = self.workers[self.hellos.index(pair.decode.hello)]
        assert reader.reads
        assert writer.writes
        self.ledger.assign(
            request.attempt,
            shape,
            decode=pair.decode.hello.worker_id,
            reader=pair.reader.hello.worker_id,
            block_size=self.block_size,
        )
        writer.waiting.append(request)
        if writer.waiting[0] is request:
            self.promise(writer)

    def view(self) -> ClusterView:
        views = [
            WorkerView(
                hello=hello,
                load=_no_report(hello),
                health=Health.ALIVE,
                coefficients=hello.coefficients,
                assigned=self.ledger.assigned(hello.worker_id),
            )
            for hello in self.hellos
        ]
        return ClusterView(
            prefill=tuple(view for view in views if view.hello.role is Role.PREFILL),
            decode=tuple(view for view in views if view.hello.role is Role.DECODE),
        )

    def promise(self, writer: PlainWorker) -> None:
        """Blocks and a place to whoever waits first, while they last; then the prompt is read."""
        while writer.waiting:
            request = writer.waiting[0]
            needed = self.blocks(num_answer_kv_tokens(request.prompt, request.output))
            if needed > writer.num_free or writer.num_admitted >= writer.max_num_requests:
                return
            writer.num_free -= needed
            writer.num_admitted += 1
            writer.waiting.popleft()
            assert request.reader is not None
            request.reader.queue.append(request)
            self.wake(request.reader)

    def wake(self, worker: PlainWorker) -> None:
        """A step begins after all that happens in this moment."""
        if not worker.is_busy:
            worker.is_busy = True
            self.at(self.now_s, lambda: self.start_step(worker))

    def start_step(self, worker: PlainWorker) -> None:
        if not worker.writes and worker.num_in_flight == worker.depth:
            worker.is_busy = False
            return
        while worker.joining:
            worker.batch.append(worker.joining.popleft())
        chunks: list[tuple[PlainRequest, int, int]] = []
        budget = worker.max_step_tokens
        if worker.batch:
            budget = max(budget - len(worker.batch), 1)
        most = worker.max_num_requests
        while worker.reads and worker.queue and budget > 0 and len(chunks) < most:
            request = worker.queue[0]
            if request.num_read == 0 and not worker.writes:
                if self.blocks(request.prompt) > worker.num_free:
                    break
                worker.num_free -= self.blocks(request.prompt)
            length = min(budget, request.prompt - request.num_read)
            chunks.append((request, request.num_read, length))
            request.num_read += length
            budget -= length
            if request.num_read == request.prompt:
                worker.queue.popleft()
        worker.is_busy = bool(chunks or worker.batch)
        tokens = sum(length for _, _, length in chunks)
        pairs = sum(num_attention_pairs(start, length) for _, start, length in chunks)
        if chunks and not worker.writes:
            self.send_down(worker, chunks, tokens, pairs)
        elif worker.is_busy:
            context = sum(worker.context(request) for request in worker.batch)
            end_s = self.now_s + worker.round_s(tokens, pairs, len(worker.batch), context)
            self.at(end_s, lambda: self.end_step(worker, chunks))

    def send_down(
        self,
        worker: PlainWorker,
        chunks: list[tuple[PlainRequest, int, int]],
        tokens: int,
        pairs: int,
    ) -> None:
        """Through one stage after the other, each of which serves one step at a time."""
        c = worker.coefficients
        step_s = c.fixed_s + c.prefill_token_s * tokens + c.prefill_attention_s * pairs
        worker.num_in_flight += 1
        end_s = self.now_s
        for stage in range(worker.depth):
            end_s = max(end_s, worker.stage_free_s.get(stage, 0.0)) + step_s / worker.depth
            worker.stage_free_s[stage] = end_s
            if stage == 0 and worker.depth > 1:
                self.at(end_s, lambda: self.start_step(worker))
        self.at(end_s, lambda: self.end_read(worker, chunks))

    def end_read(self, worker: PlainWorker, chunks: list[tuple[PlainRequest, int, int]]) -> None:
        worker.num_in_flight -= 1
        for request, start, length in chunks:
            self.end_chunk(worker, request, start + length)
        if worker.depth == 1 or not worker.is_busy:
            self.start_step(worker)

    def end_step(self, worker: PlainWorker, chunks: list[tuple[PlainRequest, int, int]]) -> None:
        for request in list(worker.batch):
            request.num_decoded += 1
            self.ledger.hear(request.attempt, 1)
            if request.num_decoded == request.output - 1:
                worker.batch.remove(request)
                self.end(request, self.now_s)
        for request, start, length in chunks:
            self.end_chunk(worker, request, start + length)
        self.start_step(worker)

    def end_chunk(self, worker: PlainWorker, request: PlainRequest, end: int) -> None:
        writer = request.writer
        assert writer is not None
        here_s = self.now_s
        if writer is not worker:
            seconds = max(worker.seconds_per_token, writer.seconds_per_token)
            begin_s = max(self.now_s, worker.link_out_s, writer.link_in_s)
            here_s = begin_s + (end - request.num_sent) * seconds
            worker.link_out_s = writer.link_in_s = here_s
            request.num_sent = end
        if end < request.prompt:
            return
        request.first_s = self.now_s + HANDOFF_S
        self.ledger.hear(request.attempt, 1)
        if request.output == 1:
            if writer is not worker:
                worker.num_free += self.blocks(request.prompt)
            self.end(request, request.first_s)
        elif writer is worker:
            worker.joining.append(request)
        else:
            self.at(here_s, lambda: self.receive(request))

    def receive(self, request: PlainRequest) -> None:
        reader, writer = request.reader, request.writer
        assert reader is not None
        assert writer is not None
        reader.num_free += self.blocks(request.prompt)
        self.wake(reader)
        writer.joining.append(request)
        self.wake(writer)

    def end(self, request: PlainRequest, end_s: float) -> None:
        request.end_s = end_s
        writer = request.writer
        assert writer is not None
        self.ledger.release(request.attempt)
        writer.num_admitted -= 1
        writer.num_free += self.blocks(num_answer_kv_tokens(request.prompt, request.output))
        self.send_next(end_s)
        self.at(self.now_s, lambda: self.promise(writer))

    def send_next(self, time_s: float) -> None:
        if self.later:
            following = self.later.popleft()
            self.at(time_s, lambda: self.arrive(following))


def _no_report(hello: WorkerHello) -> WorkerLoad:
    num = hello.num_blocks
    return WorkerLoad(
        sequence=0,
        num_waiting=0,
        num_running=0,
        waiting_prompt_tokens=0,
        running_context_tokens=0,
        kv=KvUsage(free=num, reserved=0, held=0, pinned=0, total=num),
    )
