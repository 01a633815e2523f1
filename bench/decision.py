"""`python -m bench.decision`: what the router does to choose workers for a request, on one core.

    NAME     a policy of `router.policy.POLICIES`, and the view of the cluster that it is handed
    random   peer: a healthy prefill and a healthy decode worker by chance, of the same view

Membership and account are the router's own. Requests come every 5 ms of a clock of its own, and
each worker reports once a heartbeat; between two requests as many tokens come as there are decode
workers, so that most of these have another load at each decision. Contenders take turns of 100
decisions, each with a cluster of its own. Prints wall clock times of a decision, and by the median
how many times longer each takes than the peer.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from pdserve.config.timers import Timers
from pdserve.domain.ids import PROTOCOL_VERSION, AttemptId, Epoch, RequestId, WorkerId
from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import LiveSteps, StepCoefficients, StepShape
from pdserve.domain.layout import KvLayout, LayerKv, ShardedLayout
from pdserve.domain.messages import PeerHello, Reads, Role, WorkerHello, WorkerLoad
from router.cluster_view import ClusterView, Ledger, RequestShape
from router.decode_links import DecodeLink
from router.membership import Member, Membership
from router.policy import POLICIES, Pair, Policy

Choose = Callable[[ClusterView, RequestShape], object]

TIMERS = Timers()
GAP_S = 0.005
NUM_OPEN = 8  # requests at each decode worker
NUM_BLOCKS, BLOCK_SIZE = 8192, 16
LAYOUT = ShardedLayout(
    whole=KvLayout(
        layers=(LayerKv(8, 128, 128),) * 32, block_size=BLOCK_SIZE, dtype="bfloat16", item_bytes=2
    )
)
PEER = "random"
TURN = 100  # decisions
COEFFICIENTS = StepCoefficients(
    fixed_s=0.008,
    prefill_token_s=3e-5,
    prefill_attention_s=1e-9,
    decode_token_s=1e-4,
    decode_context_token_s=1e-7,
)


class Cluster:
    """A router's membership and account, and what happens to them."""

    def __init__(self, size: int, choose: Choose) -> None:
        self.choose = choose
        self.rng = Random(size)
        self.ledger = Ledger()
        self.membership = Membership(timers=TIMERS, ledger=self.ledger)
        self.now_s, self.sequence, self.due = 0.0, 0, 0.0
        roles = (Role.PREFILL, Role.DECODE)
        self.members = [self._admit(role, number) for role in roles for number in range(size)]
        self.open: list[AttemptId] = []
        self.num_requests = 0
        for number in range(NUM_OPEN * size):
            reader, decode = self.members[number % size], self.members[size + number % size]
            self._assign(self._draw(), reader.hello.worker_id, decode.hello.worker_id)
            self.ledger.mark_read(self.open[-1])

    def decide(self) -> float:
        """One request comes; seconds until its workers are known."""
        shape = self._draw()
        began_s = time.perf_counter()
        pair = self.choose(self.membership.view(self.now_s), shape)
        took_s = time.perf_counter() - began_s
        if not isinstance(pair, Pair):
            raise SystemExit(f"no workers for a request: {pair}")
        self._assign(shape, pair.reader.hello.worker_id, pair.decode.hello.worker_id)
        return took_s

    def pass_time(self) -> None:
        """Until the next request comes: tokens, reports, and the ends of requests."""
        self.now_s += GAP_S
        for attempt in self.rng.sample(self.open, len(self.members) // 2):
            self.ledger.hear(attempt, 1)
        self.ledger.release(self.open.pop(0))
        self.due += len(self.members) * GAP_S / TIMERS.heartbeat_s
        while self.due >= 1:
            self.due -= 1
            self.sequence += 1
            member = self.members[self.sequence % len(self.members)]
            load = self._load(member.hello)
            self.membership.hear(member, load, self.now_s)

    def _draw(self) -> RequestShape:
        return RequestShape(
            num_prompt_tokens=self.rng.randint(100, 3000), max_tokens=self.rng.randint(50, 500)
        )

    def _assign(self, shape: RequestShape, reader: WorkerId, decode: WorkerId) -> None:
        self.num_requests += 1
        attempt = AttemptId(RequestId(str(self.num_requests)), 1)
        self.ledger.assign(attempt, shape, decode=decode, reader=reader, block_size=BLOCK_SIZE)
        self.open.append(attempt)

    def _admit(self, role: Role, number: int) -> Member:
        hello = WorkerHello(
            worker_id=WorkerId(f"{role}-{number}"),
            role=role,
            epoch=Epoch(1),
            protocol_version=PROTOCOL_VERSION,
            address="127.0.0.1:1",
            pid=1,
            model_name="demo",
            model_hash=b"model",
            layout=LAYOUT,
            tokenizer_hash=b"",
            max_context_tokens=8192,
            vocab_size=2048,
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            block_bytes=1,
            max_num_requests=64,
            max_step_tokens=2048,
            engine="timed",
            coefficients=COEFFICIENTS,
            reads=Reads.OTHERS if role is Role.PREFILL else Reads.NONE,
            num_stages=1,
            hardware="gpu",
            is_measured=True,
        )
        member = self.membership.admit(hello, self.now_s)
        if role is Role.DECODE:
            member.link = DecodeLink(
                member.life,
                hello.address,
                me=PeerHello(peer_id="router", epoch=Epoch(1), protocol_version=PROTOCOL_VERSION),
                connect=_nobody,
                timers=TIMERS,
                rng=self.rng,
                on_change=lambda is_open: None,
            )
        return member

    def _load(self, hello: WorkerHello) -> WorkerLoad:
        """All that the router knows of, and some work of another router."""
        known = self.ledger.assigned(hello.worker_id)
        num_used = min(known.num_blocks + 100, NUM_BLOCKS)
        shape = StepShape(num_decodes=8_000, num_decode_context_tokens=8_000_000)
        steps = LiveSteps(
            num_steps=1000,
            shape=shape,
            elapsed_s=COEFFICIENTS.steps_s(1000, shape) * self.rng.uniform(1.0, 1.2),
            relative_error=0.02,
            age_s=0.0,
        )
        return WorkerLoad(
            sequence=self.sequence,
            num_waiting=0,
            num_running=known.num_requests + 1,
            waiting_prompt_tokens=known.num_unread_tokens,
            running_context_tokens=known.num_context_tokens + 1000,
            kv=KvUsage(
                free=NUM_BLOCKS - num_used, reserved=0, held=num_used, pinned=0, total=NUM_BLOCKS
            ),
            decode_steps=steps,
        )


async def _nobody(address: str, timers: Timers) -> Any:
    raise ConnectionError(address)


def by_chance(rng: Random) -> Choose:
    def choose(view: ClusterView, shape: RequestShape) -> Pair:
        readers = [worker for worker in view.prefill if worker.is_usable]
        writers = [worker for worker in view.decode if worker.is_usable]
        return Pair(decode=rng.choice(writers), prefill_targets=(rng.choice(readers),))

    return choose


def by_policy(policy: Policy) -> Choose:
    return lambda view, shape: policy.choose(view, shape, max_wait_s=TIMERS.queue_s)


def decision_times(size: int, num: int) -> Mapping[str, list[float]]:
    """Seconds of `num` decisions of each contender; its first turn warms it up and is left out."""
    contenders: dict[str, Choose] = {name: by_policy(policy) for name, policy in POLICIES.items()}
    contenders[PEER] = by_chance(Random(1))
    clusters = {name: Cluster(size, choose) for name, choose in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in clusters}
    while min(map(len, times.values())) < num + TURN:
        for name, cluster in clusters.items():
            for _ in range(TURN):
                times[name].append(cluster.decide())
                cluster.pass_time()
    return {name: taken[TURN : TURN + num] for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 10, 100, 1000], help="of each role"
    )
    parser.add_argument("--decisions", type=int, default=1000, help="that count, of each [1000]")
    options = parser.parse_args()
    table = Table(title="A decision, milliseconds")
    for name in ("workers", "policy", "p50", "p99", f"times {PEER}"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for size in options.workers:
        times = decision_times(size, options.decisions)
        peer_s = statistics.median(times[PEER])
        for name, taken in times.items():
            p50_s, p99_s = statistics.median(taken), sorted(taken)[len(taken) * 99 // 100]
            cells = [f"{1e3 * p50_s:.3f}", f"{1e3 * p99_s:.3f}", f"{p50_s / peer_s:.1f} x"]
            table.add_row(f"{size} + {size}", name, *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
