"""In the order of a discipline, bounded, and nothing left behind."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.domain.ids import HandoffId, RequestId
from pdserve.domain.messages import StartHandoff
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.waiting import DISCIPLINES, QueueOrder
from pdserve.rpc.streams import memory_stream_pair
from prefill_worker.queue import PrefillQueue, PrefillRequest

PEER, _ = memory_stream_pair()
QUEUE_S = 10.0


def request(name: int, arrived_s: float, deadline_s: float, num_tokens: int = 5) -> PrefillRequest:
    return PrefillRequest(
        start=StartHandoff(
            handoff=HandoffId(RequestId(str(name)), 1, 0),
            prompt_token_ids=tuple(range(num_tokens)),
            first_block=0,
            sampling=SamplingParams(),
            deadline_s=deadline_s,
        ),
        peer=PEER,
        arrived_s=arrived_s,
        leave_by_s=arrived_s + min(deadline_s, QUEUE_S),
        names=(),
    )


def queue_of(max_num_waiting: int, order: QueueOrder = "deadline") -> PrefillQueue:
    return PrefillQueue(DISCIPLINES[order], max_num_waiting)


def push(queue: PrefillQueue, request: PrefillRequest) -> bool:
    return queue.push(request.key, request)


def drain(queue: PrefillQueue) -> list[str]:
    names = []
    while (head := queue.peek()) is not None:
        names.append(str(head.handoff.request_id))
        queue.remove(head.key)
    return names


def test_near_deadline_goes_first_and_a_far_one_rises_as_it_waits() -> None:
    queue = queue_of(8)
    push(queue, request(0, arrived_s=0.0, deadline_s=600.0))
    push(queue, request(1, arrived_s=5.0, deadline_s=2.0))
    push(queue, request(2, arrived_s=9.0, deadline_s=600.0))
    push(queue, request(3, arrived_s=9.5, deadline_s=1.5))
    assert drain(queue) == ["1", "0", "3", "2"]


def test_equal_urgency_is_served_in_order_of_arrival() -> None:
    queue = queue_of(8)
    for name in range(4):
        push(queue, request(name, arrived_s=0.0, deadline_s=3.0))
    assert drain(queue) == ["0", "1", "2", "3"]


def test_full_queue_takes_nothing() -> None:
    queue = queue_of(1)
    assert push(queue, request(0, 0.0, 1.0))
    assert not push(queue, request(1, 0.0, 1.0))
    assert (len(queue), queue.num_tokens) == (1, 5)


def test_first_come_first_served_whatever_the_deadlines() -> None:
    queue = queue_of(8, "fcfs")
    for name, deadline_s in enumerate((600.0, 2.0, 1.0)):
        push(queue, request(name, arrived_s=0.0, deadline_s=deadline_s))
    assert drain(queue) == ["0", "1", "2"]


@given(
    order=st.sampled_from(list(DISCIPLINES)),
    moves=st.lists(
        st.tuples(st.sampled_from(["push", "remove"]), st.integers(0, 12), st.integers(1, 20)),
        max_size=60,
    ),
)
def test_head_is_the_first_of_those_that_wait(
    order: QueueOrder, moves: list[tuple[str, int, int]]
) -> None:
    queue, model = queue_of(6, order), dict[str, PrefillRequest]()
    for now_s, (move, name, deadline_s) in enumerate(moves):
        each = request(name, float(now_s), float(deadline_s), num_tokens=name + 1)
        if move == "push" and str(name) not in model:
            assert push(queue, each) == (len(model) < 6)
            if len(model) < 6:
                model[str(name)] = each
        elif move == "remove":
            assert queue.remove(each.key) is model.pop(str(name), None)
        assert len(queue) == len(model)
        assert queue.num_tokens == sum(waiting.num_tokens for waiting in model.values())
        head = queue.peek()
        assert (head is None) == (not model)
        assert list(queue) == sorted(model.values(), key=DISCIPLINES[order])  # which is stable
        assert head is next(iter(queue), None)
