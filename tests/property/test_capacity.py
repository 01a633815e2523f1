"""A request is refused for good if, and only if, idle workers of the cluster could not serve it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.intake import Intake
from decode_worker.requests import DecodeRequest
from decode_worker.stream import Answer, RouterOutbox
from pdserve.config.timers import Timers
from pdserve.domain.errors import BadRequest, Reason
from pdserve.domain.ids import RequestId
from pdserve.domain.messages import Role, Submit, WorkerHello
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.waiting import DISCIPLINES
from pdserve.engine.block_pool import BlockPool
from pdserve.rpc.streams import memory_stream_pair
from router.admission import TextLimits, check_call, check_fit
from router.cluster_view import Health, Ledger, RequestShape
from router.membership import Membership
from router.policy import Pair, least_total_time
from router.requests import GenerateCall
from tests.support.worker_pair import demo_tokenizer
from tests.unit.router.builders import LAYOUT, OTHER_LAYOUT, make_hello, make_view, make_worker

LIMITS = TextLimits(max_prompt_chars=1)
SIZES = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(1, 12),
        "max_context_tokens": st.sampled_from([40, 64, 1000]),
        "layout": st.sampled_from([LAYOUT, OTHER_LAYOUT]),
    }
)


@dataclass(frozen=True)
class Cluster:
    block_size: int
    prefill: list[dict[str, Any]]
    decode: list[dict[str, Any]]

    def hellos(self) -> list[WorkerHello]:
        return [
            make_hello(f"{role}-{index}", role, block_size=self.block_size, **sizes)
            for role, pool in ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode))
            for index, sizes in enumerate(pool)
        ]


CLUSTERS = st.builds(
    Cluster,
    block_size=st.sampled_from([1, 4, 16]),
    prefill=st.lists(SIZES, max_size=3),
    decode=st.lists(SIZES, min_size=1, max_size=3),
)


def is_too_long(check: Callable[[], object]) -> bool:
    reason = None
    try:
        check()
    except BadRequest as error:
        reason = error.reason
    assert reason in (None, Reason.CONTEXT_TOO_LONG)
    return reason is not None


def is_refused_for_good(hellos: list[WorkerHello], num_prompt: int, max_tokens: int) -> bool:
    membership = Membership(timers=Timers(), ledger=Ledger())
    for hello in hellos:
        membership.admit(hello, 0.0)
    model = membership.served_model("demo")
    assert model is not None
    call = GenerateCall(prompt=(1,) * num_prompt, sampling=SamplingParams(max_tokens=max_tokens))
    check_call(call, model.name, LIMITS)
    return is_too_long(lambda: check_fit(call, model, LIMITS))


def idle_decode_worker_takes(hello: WorkerHello, num_prompt: int, max_tokens: int) -> bool:
    """By the workers' own parts: the context as the service checks it, blocks by the intake."""

    async def run() -> None:
        sampling = SamplingParams(max_tokens=max_tokens)
        request = DecodeRequest(
            Submit(
                request_id=RequestId("r"),
                attempt=1,
                prompt_token_ids=(1,) * num_prompt,
                sampling=sampling,
                deadline_s=60.0,
                prefill_targets=(),
            ),
            answer=Answer(sampling, eos_token_ids=(), detokenizer=demo_tokenizer().detokenizer()),
            outbox=RouterOutbox(memory_stream_pair()[0]),
            names=(),
            clock=lambda: 0.0,
        )
        intake = Intake(
            BlockPool(hello.num_blocks),
            block_size=hello.block_size,
            max_num_requests=1,
            max_num_queued=0,
            discipline=DISCIPLINES["fcfs"],
            queue_s=1.0,
            clock=lambda: 0.0,
        )
        await intake.admit(request)

    has_context = num_prompt + max_tokens <= hello.max_context_tokens
    return has_context and not is_too_long(lambda: asyncio.run(run()))


def idle_prefill_worker_takes(hello: WorkerHello, num_prompt: int) -> bool:
    num_blocks = -(-num_prompt // hello.block_size)
    has_room = BlockPool(hello.num_blocks).reserve(num_blocks) is not None
    return has_room and num_prompt <= hello.max_context_tokens


@settings(max_examples=200, deadline=None)
@given(cluster=CLUSTERS, num_prompt=st.integers(1, 200), max_tokens=st.integers(1, 60))
def test_refused_for_good_is_what_an_idle_cluster_cannot_serve(
    cluster: Cluster, num_prompt: int, max_tokens: int
) -> None:
    hellos = cluster.hellos()
    able = [
        hello.worker_id
        for hello in hellos
        if hello.role is Role.DECODE and idle_decode_worker_takes(hello, num_prompt, max_tokens)
    ]
    assert is_refused_for_good(hellos, num_prompt, max_tokens) is (not able)
    workers = [
        make_worker(
            hello.worker_id,
            hello.role,
            health=Health.ALIVE,
            block_size=hello.block_size,
            num_blocks=hello.num_blocks,
            max_context_tokens=hello.max_context_tokens,
            layout=hello.layout,
        )
        for hello in hellos
    ]
    shape = RequestShape(num_prompt_tokens=num_prompt, max_tokens=max_tokens)
    choice = least_total_time.choose(make_view(*workers), shape)
    assert isinstance(choice, Pair) is bool(able)
    if isinstance(choice, Pair):
        assert choice.decode.hello.worker_id in able
        for target in choice.prefill_targets:
            assert idle_prefill_worker_takes(target.hello, num_prompt)
