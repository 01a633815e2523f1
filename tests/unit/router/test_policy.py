"""Pair choice against cases computed by hand; by the least total time if no other is named.

COEFFICIENTS: a step costs 10 ms, a prompt token 1 ms, a decoding request 2 ms, 100 tokens of
context 1 ms. So a prompt of 100 tokens alone takes 110 ms, and a first decode step over it
10 + 2 + 1 = 13 ms.
"""

from dataclasses import replace
from typing import Any, get_args

import pytest

from pdserve.domain.messages import Reads, Role
from pdserve.domain.pair_cost import PolicyName
from router.cluster_view import Assigned, ClusterView, Health, RequestShape
from router.policy import (
    POLICIES,
    NoWorkers,
    Overloaded,
    Pair,
    least_requests,
    least_total_time,
    read_s,
    step_s,
)
from tests.unit.router.builders import (
    COEFFICIENTS,
    LAYOUT,
    OTHER_LAYOUT,
    make_hello,
    make_load,
    make_view,
    make_worker,
)

SHAPE = RequestShape(num_prompt_tokens=100, max_tokens=10)
choose_pair = least_total_time.choose


def chosen(pair: Pair | NoWorkers | Overloaded) -> tuple[str, list[str]]:
    assert isinstance(pair, Pair), pair
    return pair.decode.hello.worker_id, [worker.hello.worker_id for worker in pair.prefill_targets]


def test_reading_and_step_time_of_an_idle_pair() -> None:
    pair = choose_pair(make_view(make_worker("d0"), make_worker("p0", Role.PREFILL)), SHAPE)
    assert isinstance(pair, Pair)
    assert read_s(pair.reader, SHAPE.num_prompt_tokens) == pytest.approx(0.110)
    assert step_s(pair.decode, SHAPE) == pytest.approx(0.013)
    assert pair.reader.hello.worker_id == "p0"


def test_queue_ahead_of_the_prefill_worker_counts() -> None:
    # 600 tokens ahead and 100 of its own are two chunks: 2 * 10 ms + 700 ms.
    busy = Assigned(num_requests=2, num_unread_tokens=600)
    view = make_view(make_worker("d0"), make_worker("p0", Role.PREFILL, assigned=busy))
    pair = choose_pair(view, SHAPE)
    assert isinstance(pair, Pair)
    assert pair.wait_s == pytest.approx(0.620)
    assert read_s(pair.reader, SHAPE.num_prompt_tokens) == pytest.approx(0.720)


def test_prefill_targets_come_in_order_of_ttft_three_at_most() -> None:
    view = make_view(
        make_worker("d0"),
        make_worker("p0", Role.PREFILL, assigned=Assigned(num_unread_tokens=300)),
        make_worker("p1", Role.PREFILL, assigned=Assigned(num_unread_tokens=200)),
        make_worker("p2", Role.PREFILL, assigned=Assigned(num_unread_tokens=100)),
        make_worker("p3", Role.PREFILL),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("d0", ["p3", "p2", "p1"])


def test_queue_reported_by_the_worker_counts_where_it_is_longer_than_ours() -> None:
    view = make_view(
        make_worker("d0"),
        make_worker("p0", Role.PREFILL, load=make_load(waiting_prompt_tokens=500)),
        make_worker("p1", Role.PREFILL, assigned=Assigned(num_unread_tokens=400)),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("d0", ["p1", "p0"])


def test_own_work_that_ended_after_the_report_does_not_count() -> None:
    # p0's report had 500 tokens when 500 of ours were there; they have been read since.
    reported = make_load(waiting_prompt_tokens=500)
    then = Assigned(num_unread_tokens=500)
    stale = make_worker("p0", Role.PREFILL, load=reported, assigned_at_report=then)
    other = make_worker("p1", Role.PREFILL, assigned=Assigned(num_unread_tokens=100))
    assert chosen(choose_pair(make_view(make_worker("d0"), stale, other), SHAPE))[1] == ["p0", "p1"]


def test_decode_worker_with_the_shorter_step_wins() -> None:
    view = make_view(
        make_worker("d0", assigned=Assigned(num_requests=3, num_context_tokens=300)),
        make_worker("d1", assigned=Assigned(num_requests=2, num_context_tokens=700)),
    )
    # d0: 10 + 4*2 + 4 = 22 ms a step; d1: 10 + 3*2 + 8 = 24 ms.
    assert chosen(choose_pair(view, SHAPE)) == ("d0", [])


def test_decode_worker_without_room_for_the_blocks_comes_last() -> None:
    # 110 tokens are 7 blocks; d0 has 6 left, d1 is slower and has them.
    view = make_view(
        make_worker("d0", assigned=Assigned(num_blocks=94)),
        make_worker("d1", assigned=Assigned(num_requests=5, num_context_tokens=5000)),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("d1", [])


def test_blocks_in_use_by_others_count() -> None:
    view = make_view(
        make_worker("d0", load=make_load(num_in_use=94)),
        make_worker("d1", load=make_load(num_in_use=93, num_running=2)),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("d1", [])


def test_full_batch_comes_last() -> None:
    view = make_view(
        make_worker("d0", assigned=Assigned(num_requests=8)),
        make_worker("d1", assigned=Assigned(num_requests=7, num_context_tokens=9000)),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("d1", [])


def test_worker_that_can_never_hold_the_answer_is_no_candidate() -> None:
    view = make_view(make_worker("d0", num_blocks=6), make_worker("d1", num_blocks=7))
    assert chosen(choose_pair(view, SHAPE)) == ("d1", [])
    assert choose_pair(make_view(make_worker("d0", num_blocks=6)), SHAPE) == NoWorkers()


def test_ties_go_to_the_smallest_ids() -> None:
    view = make_view(
        make_worker("d1"),
        make_worker("d0"),
        make_worker("p1", Role.PREFILL),
        make_worker("p0", Role.PREFILL),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("d0", ["p0", "p1"])
    mirrored = ClusterView(prefill=view.prefill[::-1], decode=view.decode[::-1])
    assert chosen(choose_pair(mirrored, SHAPE)) == ("d0", ["p0", "p1"])


def test_without_prefill_workers_the_decode_worker_reads_the_prompt() -> None:
    pair = choose_pair(make_view(make_worker("d0")), SHAPE)
    assert isinstance(pair, Pair)
    assert pair.prefill_targets == ()
    assert pair.reader is pair.decode
    assert read_s(pair.reader, SHAPE.num_prompt_tokens) == pytest.approx(0.110)


def test_colocated_worker_reads_its_own_prompts_beside_idle_prefill_workers() -> None:
    # c0 has a shorter step than d0, though it has a prompt to read before this one.
    view = make_view(
        make_worker("c0", reads=Reads.OWN, assigned=Assigned(num_unread_tokens=10)),
        make_worker("d0", assigned=Assigned(num_requests=7, num_context_tokens=9000)),
        make_worker("p0", Role.PREFILL),
    )
    pair = choose_pair(view, SHAPE)
    assert chosen(pair) == ("c0", [])
    assert isinstance(pair, Pair)
    assert pair.reader is pair.decode


def test_handoff_is_part_of_the_time_to_the_first_token() -> None:
    # d0 has the smaller id, and all are idle; but its prompt is handed over.
    own = make_worker("e0", reads=Reads.OWN)
    view = make_view(make_worker("d0"), own, make_worker("p0", Role.PREFILL))
    assert chosen(choose_pair(view, SHAPE)) == ("e0", [])


def test_decode_worker_hands_its_prompts_on_beside_idle_colocated_workers() -> None:
    # d0 has the shorter step; p0 is slow, but no prompt is handed to a colocated worker.
    view = make_view(
        make_worker("c0", reads=Reads.OWN, assigned=Assigned(num_requests=7)),
        make_worker("d0"),
        make_worker("p0", Role.PREFILL, assigned=Assigned(num_unread_tokens=100)),
    )
    shape = RequestShape(num_prompt_tokens=100, max_tokens=100)
    assert chosen(choose_pair(view, shape)) == ("d0", ["p0"])


def test_without_prefill_workers_decode_workers_read_beside_colocated_ones() -> None:
    view = make_view(
        make_worker("c0", reads=Reads.OWN, assigned=Assigned(num_unread_tokens=500)),
        make_worker("d0"),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("d0", [])


@pytest.mark.parametrize("health", [Health.SUSPECT, Health.DRAINING])
def test_suspect_and_draining_workers_get_nothing(health: Health) -> None:
    view = make_view(
        make_worker("d0", health=health),
        make_worker("d1"),
        make_worker("p0", Role.PREFILL, health=health),
        make_worker("p1", Role.PREFILL),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("d1", ["p1"])


def test_suspect_decode_worker_is_taken_where_there_is_no_healthy_one() -> None:
    suspect = make_worker("d0", health=Health.SUSPECT)
    draining = make_worker("d1", health=Health.DRAINING)
    assert chosen(choose_pair(make_view(suspect, draining), SHAPE)) == ("d0", [])
    assert choose_pair(make_view(draining), SHAPE) == NoWorkers()


def test_decode_worker_without_a_stream_gets_nothing() -> None:
    assert choose_pair(make_view(make_worker("d0", health=Health.JOINING)), SHAPE) == NoWorkers()


@pytest.mark.parametrize("change", [{"layout": OTHER_LAYOUT}, {"model_hash": b"other"}])
def test_prefill_worker_of_another_model_or_layout_is_never_paired(
    change: dict[str, Any],
) -> None:
    view = make_view(
        make_worker("d0"),
        make_worker("p0", Role.PREFILL, **change),
        make_worker("p1", Role.PREFILL, assigned=Assigned(num_unread_tokens=900)),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("d0", ["p1"])


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_workers_are_paired_however_their_ranks_divide_the_model(tp: int, pp: int) -> None:
    view = make_view(
        make_worker("d0", layout=replace(LAYOUT, tp=tp, pp=pp)),
        make_worker("p0", Role.PREFILL, layout=replace(LAYOUT, pp=2)),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("d0", ["p0"])


def test_workers_that_failed_this_request_are_left_out_in_that_life_only() -> None:
    d0, d1, p0 = make_worker("d0"), make_worker("d1"), make_worker("p0", Role.PREFILL)
    excluded = frozenset({d0.life, p0.life})
    assert chosen(choose_pair(make_view(d0, d1, p0), SHAPE, excluded=excluded)) == ("d1", [])
    assert choose_pair(make_view(d0, p0), SHAPE, excluded=excluded) == NoWorkers()
    reborn = make_worker("d0", epoch=make_hello().epoch + 1)
    assert chosen(choose_pair(make_view(reborn), SHAPE, excluded=excluded)) == ("d0", [])


def test_queue_longer_than_allowed_is_refused_with_the_time_it_needs() -> None:
    queued = Assigned(num_unread_tokens=5120)  # 10 chunks: 5.22 s
    view = make_view(make_worker("d0"), make_worker("p0", Role.PREFILL, assigned=queued))
    refused = choose_pair(view, SHAPE, max_wait_s=4.0)
    assert isinstance(refused, Overloaded)
    assert refused.retry_after_s == pytest.approx(1.22)
    assert isinstance(choose_pair(view, SHAPE, max_wait_s=5.3), Pair)


def test_prefill_worker_that_cannot_hold_the_prompt_is_no_candidate() -> None:
    small = make_worker("p0", Role.PREFILL, num_blocks=6)  # the prompt has 7 blocks
    large = make_worker("p1", Role.PREFILL, num_blocks=7, assigned=Assigned(num_unread_tokens=900))
    short = make_worker("p2", Role.PREFILL, max_context_tokens=99)
    decode = make_worker("d0")
    assert chosen(choose_pair(make_view(decode, small, large, short), SHAPE)) == ("d0", ["p1"])
    # With none left the decode worker reads the prompt itself.
    assert chosen(choose_pair(make_view(decode, small, short), SHAPE)) == ("d0", [])


def test_answer_may_fill_the_decode_worker_but_for_its_last_token() -> None:
    view = make_view(make_worker("d0", num_blocks=7))  # 112 tokens
    fitting = RequestShape(num_prompt_tokens=100, max_tokens=13)
    assert chosen(choose_pair(view, fitting)) == ("d0", [])
    assert choose_pair(view, RequestShape(num_prompt_tokens=100, max_tokens=14)) == NoWorkers()


LATE = Assigned(num_unread_tokens=2048)  # 4 chunks: 2.088 s


def test_slower_reader_that_meets_the_wait_is_taken_before_a_fast_one_that_does_not() -> None:
    slow = replace(COEFFICIENTS, prefill_token_s=0.05)  # 5 s for this prompt
    view = make_view(
        make_worker("d0"),
        make_worker("p0", Role.PREFILL, assigned=LATE),
        make_worker("p1", Role.PREFILL, coefficients=slow),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("d0", ["p0", "p1"])
    assert chosen(choose_pair(view, SHAPE, max_wait_s=2.0)) == ("d0", ["p1", "p0"])
    assert chosen(choose_pair(view, SHAPE, max_wait_s=2.1)) == ("d0", ["p0", "p1"])


def test_pair_that_meets_the_wait_is_taken_before_one_that_does_not_even_if_it_is_full() -> None:
    view = make_view(
        make_worker("c0", reads=Reads.OWN, assigned=LATE),
        make_worker("c1", reads=Reads.OWN, assigned=Assigned(num_requests=8)),
    )
    assert chosen(choose_pair(view, SHAPE)) == ("c0", [])
    assert chosen(choose_pair(view, SHAPE, max_wait_s=2.0)) == ("c1", [])


def test_refused_request_is_told_when_the_shortest_queue_is_short_enough() -> None:
    # By total time p0 is the best reader; p1 has less ahead, but reads slowly.
    slow = replace(COEFFICIENTS, prefill_token_s=0.02)
    view = make_view(
        make_worker("d0"),
        make_worker("p0", Role.PREFILL, assigned=LATE),
        make_worker(
            "p1", Role.PREFILL, assigned=Assigned(num_unread_tokens=100), coefficients=slow
        ),
    )
    refused = choose_pair(view, SHAPE, max_wait_s=1.0)
    assert isinstance(refused, Overloaded)
    assert refused.retry_after_s == pytest.approx(2.01 - 1.0)


def test_each_name_of_a_policy_is_known_to_the_router() -> None:
    assert list(POLICIES) == list(get_args(PolicyName))


def test_least_requests_counts_requests_whatever_they_cost() -> None:
    view = make_view(
        make_worker("d0", assigned=Assigned(num_requests=2)),
        make_worker("d1", assigned=Assigned(num_requests=1, num_context_tokens=9000)),
        make_worker("p0", Role.PREFILL, assigned=Assigned(num_requests=2, num_unread_tokens=2)),
        make_worker("p1", Role.PREFILL, assigned=Assigned(num_requests=1, num_unread_tokens=800)),
    )
    assert chosen(least_requests.choose(view, SHAPE)) == ("d1", ["p1", "p0"])
    assert chosen(least_total_time.choose(view, SHAPE)) == ("d0", ["p0", "p1"])


def test_least_requests_keeps_to_workers_with_room_and_to_the_longest_wait() -> None:
    full = Assigned(num_requests=1, num_blocks=94)
    view = make_view(
        make_worker("d0", assigned=full),
        make_worker("d1", assigned=Assigned(num_requests=2)),
        make_worker("p0", Role.PREFILL, assigned=replace(LATE, num_requests=1)),
        make_worker("p1", Role.PREFILL, assigned=Assigned(num_requests=3)),
    )
    assert chosen(least_requests.choose(view, SHAPE)) == ("d1", ["p0", "p1"])
    assert chosen(least_requests.choose(view, SHAPE, max_wait_s=2.0)) == ("d1", ["p1", "p0"])
