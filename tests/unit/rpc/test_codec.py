"""Every message survives the wire; nonsense from a peer is a ValueError."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.domain import messages as m
from pdserve.domain.errors import Reason
from pdserve.domain.ids import Epoch, HandoffId, WorkerId
from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import LiveSteps, StepCoefficients, StepShape
from pdserve.domain.layout import MAX_NUM_LAYERS, BlockOrder, KvLayout, LayerKv, ShardedLayout
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Completed, Failed, PhaseTimeline, SampledToken
from pdserve.rpc import codec, membership_codec
from pdserve.v1 import decode_pb2, layout_pb2, membership_pb2, prefill_pb2, types_pb2

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
duration = st.floats(0, 1e6)
tokens = st.lists(uint32, max_size=5).map(tuple)
label = st.text(max_size=8)

sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_k=uint32,
    top_p=st.floats(0, 1),
    seed=uint64,
    max_tokens=uint32,
    min_tokens=uint32,
    stop=st.lists(label, max_size=3).map(tuple),
    stop_token_ids=tokens,
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    skip_special_tokens=st.booleans(),
    include_stop_str_in_output=st.booleans(),
)
sampled = st.builds(SampledToken, uint32) | st.builds(
    SampledToken,
    uint32,
    st.floats(-50, 0),
    st.lists(st.tuples(uint32, st.floats(-50, 0)), max_size=3).map(tuple),
)
failed = st.builds(Failed, reason=st.sampled_from(Reason), message=label, retry_after_s=duration)
handoff = st.builds(HandoffId, label, uint32, uint32)
timeline = st.builds(
    PhaseTimeline, ttft_s=duration, attempts=uint32, prefill_worker=label, decode_worker=label
)
completed = st.builds(Completed, cached_prompt_tokens=uint32, timeline=timeline)
layer = st.builds(
    LayerKv,
    num_kv_heads=st.sampled_from([1, 2, 4, 8]),
    k_head_dim=st.integers(1, 2**32 - 1),
    v_head_dim=uint32,
)
layout = st.builds(
    ShardedLayout,
    whole=st.builds(
        KvLayout,
        layers=st.lists(st.tuples(layer, st.integers(1, 3)), min_size=1, max_size=3).map(
            lambda runs: tuple(kv for kv, num_layers in runs for _ in range(num_layers))
        ),
        block_size=st.integers(1, 2**10),
        order=st.sampled_from(BlockOrder),
        dtype=st.text(min_size=1, max_size=8),
        item_bytes=st.integers(1, 8),
    ),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.just(1),
)


@st.composite
def handoff_hellos(draw: st.DrawFn) -> m.HandoffHello:
    described = draw(st.none() | layout)

    def region(rank: int) -> st.SearchStrategy[m.RemoteRegion]:
        held = described.rank(rank).layout.block_bytes if described else 1
        return st.builds(
            m.RemoteRegion,
            transport=label,
            address=st.dictionaries(label, label, max_size=3),
            num_blocks=uint32,
            block_bytes=st.just(held),
            rank=st.just(rank),
        )

    ranks = st.integers(0, described.num_ranks - 1) if described else st.just(0)
    return m.HandoffHello(
        worker_id=WorkerId(draw(label)),
        epoch=Epoch(draw(uint64)),
        protocol_version=draw(uint32),
        model_hash=draw(st.binary(max_size=16)),
        layout=described,
        regions=tuple(draw(st.lists(ranks.flatmap(region), max_size=3))),
    )


handoff_hello = handoff_hellos()
peer_hello = st.builds(m.PeerHello, peer_id=label, epoch=uint64, protocol_version=uint32)
target = st.builds(m.PrefillTarget, worker_id=label, address=label, epoch=uint64)
output = st.builds(
    m.RequestOutput,
    request_id=label,
    attempt=uint32,
    first_index=uint32,
    tokens=st.lists(sampled, max_size=3).map(tuple),
    text=label,
    end=st.none() | failed | completed,
)
usage = st.tuples(*[st.integers(0, 1000)] * 4).map(
    lambda four: KvUsage(
        free=four[0], reserved=four[1], held=four[2], pinned=four[3], total=sum(four)
    )
)
live_steps = st.builds(
    LiveSteps,
    num_steps=uint32.filter(bool),
    shape=st.builds(
        StepShape,
        num_prefill_tokens=uint64,
        num_prefill_pairs=uint64,
        num_decodes=uint64,
        num_decode_context_tokens=uint64,
    ),
    elapsed_s=duration.filter(bool),
    relative_error=duration,
    age_s=duration,
)
load = st.builds(
    m.WorkerLoad,
    sequence=uint64,
    num_waiting=uint32,
    num_running=uint32,
    waiting_prompt_tokens=uint64,
    running_context_tokens=uint64,
    kv=usage,
    prefill_steps=st.none() | live_steps,
    decode_steps=st.none() | live_steps,
    kv_paths=st.lists(
        st.builds(
            m.KvPath,
            worker_id=label,
            transport=label,
            why=label,
            num_fallbacks=uint64,
            moved=st.builds(
                m.KvMoved, moved_bytes=uint64, skipped_bytes=uint64, retried_bytes=uint64
            ),
        ),
        max_size=3,
    ).map(tuple),
)
worker_hello = st.builds(
    m.WorkerHello,
    worker_id=label,
    role=st.sampled_from(m.Role),
    epoch=uint64,
    protocol_version=uint32,
    address=label,
    pid=uint32,
    model_name=label,
    model_hash=st.binary(max_size=16),
    layout=st.none() | layout,
    tokenizer_hash=st.binary(max_size=16),
    max_context_tokens=uint32,
    vocab_size=uint32,
    block_size=uint32,
    num_blocks=uint32,
    block_bytes=uint64,
    max_num_requests=uint32,
    max_step_tokens=uint32,
    engine=label,
    hardware=label,
    is_measured=st.booleans(),
    coefficients=st.builds(
        StepCoefficients,
        fixed_s=duration,
        prefill_token_s=duration,
        prefill_attention_s=duration,
        decode_token_s=duration,
        decode_context_token_s=duration,
    ),
    reads=st.sampled_from(m.Reads),
    num_stages=st.integers(1, 2**32 - 1),
)

to_decode = (
    peer_hello
    | st.builds(m.Cancel, request_id=label, attempt=uint32)
    | st.builds(
        m.Submit,
        request_id=label,
        attempt=uint32,
        prompt_token_ids=tokens,
        sampling=sampling,
        deadline_s=duration,
        prefill_targets=st.lists(target, max_size=2).map(tuple),
    )
)
from_decode = peer_hello | st.builds(m.StepOutputs, st.lists(output, max_size=3).map(tuple))
to_prefill = (
    handoff_hello
    | st.builds(
        m.StartHandoff,
        handoff=handoff,
        prompt_token_ids=tokens,
        first_block=uint32,
        sampling=sampling,
        deadline_s=duration,
        reads_parts=st.booleans(),
    )
    | st.builds(m.BlocksPulled, handoff=handoff, first_block=uint32, num_blocks=uint32)
    | st.builds(m.RenewLeases, st.lists(handoff, max_size=3).map(tuple))
    | st.builds(m.EndHandoff, handoff)
)
from_prefill = (
    handoff_hello
    | st.builds(m.HandoffRefused, handoff=handoff, failure=failed)
    | st.builds(m.HandoffFailed, handoff=handoff, failure=failed)
    | st.builds(
        m.BlocksForming,
        handoff=handoff,
        first_block=uint32,
        block_ids=tokens,
        num_ready_parts=uint32,
    )
    | st.builds(
        m.BlocksOffered,
        handoff=handoff,
        first_block=uint32,
        block_ids=tokens,
        digests=st.lists(st.binary(min_size=16, max_size=16), max_size=3).map(tuple),
    )
    | st.builds(
        m.PrefillDone,
        handoff=handoff,
        first_token=sampled,
        queue_s=duration,
        prefill_s=duration,
        cached_tokens=uint32,
    )
)


def over_the_wire(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())


@given(to_decode)
def test_router_messages_survive_the_wire(message: m.RouterToDecode) -> None:
    sent = over_the_wire(codec.router_message_to_proto(message))
    assert codec.router_message_from_proto(sent) == message


@given(from_decode)
def test_decode_messages_survive_the_wire(message: m.DecodeToRouter) -> None:
    sent = over_the_wire(codec.decode_message_to_proto(message))
    assert codec.decode_message_from_proto(sent) == message


@given(to_prefill)
def test_messages_to_prefill_survive_the_wire(message: m.DecodeToPrefill) -> None:
    sent = over_the_wire(codec.to_prefill_proto(message))
    assert codec.from_decode_proto(sent) == message


@given(from_prefill)
def test_messages_from_prefill_survive_the_wire(message: m.PrefillToDecode) -> None:
    sent = over_the_wire(codec.to_decode_proto(message))
    assert codec.from_prefill_proto(sent) == message


@given(worker_hello | load)
def test_worker_reports_survive_the_wire(report: m.WorkerReport) -> None:
    sent = over_the_wire(membership_codec.report_to_proto(report))
    assert membership_codec.report_from_proto(sent) == report


@given(worker_hello)
def test_worker_that_does_not_say_what_it_reads_reads_as_its_role_has_it(
    hello: m.WorkerHello,
) -> None:
    message = membership_codec.hello_to_proto(hello)
    message.ClearField("reads")
    message.ClearField("num_stages")
    reads = m.Reads.OTHERS if hello.role is m.Role.PREFILL else m.Reads.NONE
    expected = replace(hello, reads=reads, num_stages=1)
    assert membership_codec.hello_from_proto(over_the_wire(message)) == expected


def test_unknown_reads_are_an_error() -> None:
    message = membership_pb2.WorkerHello(role=membership_pb2.ROLE_DECODE)
    message.MergeFromString(b"\xa0\x01\x07")  # field 20: 7
    with pytest.raises(ValueError, match="unknown reads 7"):
        membership_codec.hello_from_proto(message)


@given(st.lists(st.tuples(worker_hello, load), max_size=2))
def test_cluster_state_survives_the_wire(
    workers: list[tuple[m.WorkerHello, m.WorkerLoad]],
) -> None:
    state = m.ClusterState(
        router_id="r",
        model_name="demo",
        public_address="127.0.0.1:1",
        uptime_s=1.5,
        num_completed=7,
        workers=tuple(
            m.WorkerState(
                hello=hello,
                load=load,
                health="alive",
                silence_s=0.1,
                num_assigned=2,
                coefficients=hello.coefficients,
            )
            for hello, load in workers
        ),
    )
    sent = over_the_wire(membership_codec.cluster_to_proto(state))
    assert membership_codec.cluster_from_proto(sent) == state


def test_reason_that_only_a_newer_peer_knows_still_ends_its_request() -> None:
    failure = codec.failure_from_proto(types_pb2.Failure(reason="NO_SUCH_REASON", message="m"))
    assert failure == Failed(reason=Reason.INTERNAL, message="m")


def test_unset_sampling_fields_take_the_documented_defaults() -> None:
    params = codec.sampling_from_proto(types_pb2.SamplingParams())
    assert params == SamplingParams()


LAYER = {"num_layers": 2, "num_kv_heads": 4, "k_head_dim": 8, "v_head_dim": 8}
LAYOUT = {
    "block_size": 16,
    "dtype": "float32",
    "item_bytes": 4,
    "tp": 2,
    "pp": 1,
    "order": "tokens",
}


def hello_with_layout(
    *layers: dict[str, int], regions: Any = (), **changes: Any
) -> prefill_pb2.HandoffHello:
    """As a peer may send it: two layers on two ranks, unless something else is said."""
    fields: Any = LAYOUT | changes
    described = layout_pb2.ShardedLayout(
        layers=[layout_pb2.LayerKv(**each) for each in layers or (LAYER,)], **fields
    )
    return prefill_pb2.HandoffHello(layout=described, regions=regions)


def parsed(hello: prefill_pb2.HandoffHello) -> m.HandoffHello:
    message = codec.from_decode_proto(prefill_pb2.DecodeToPrefill(hello=hello))
    assert isinstance(message, m.HandoffHello)
    return message


def region_of(rank: int, block_bytes: int) -> prefill_pb2.RemoteRegion:
    return prefill_pb2.RemoteRegion(transport="shm", rank=rank, block_bytes=block_bytes)


def test_equal_layouts_of_two_peers_are_one_object() -> None:
    first, second = parsed(hello_with_layout()), parsed(hello_with_layout())
    assert first.layout is second.layout is not None
    assert parsed(hello_with_layout(tp=1)).layout not in (None, first.layout)


def test_layer_runs_of_a_peer_count_before_they_are_unrolled() -> None:
    runs = [LAYER | {"num_layers": 2**32 - 1}] * 3
    with pytest.raises(ValueError, match=f"may have {MAX_NUM_LAYERS} layers; got 12884901885"):
        parsed(hello_with_layout(*runs))


def test_layout_of_more_bytes_than_any_valid_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="a KV layout may have 65536 bytes"):
        parsed(hello_with_layout(*[LAYER | {"num_layers": 0}] * 9000))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": 1025}, "block_size of a KV layout: must be 1 to 1024; got 1025"),
        ({"order": ""}, "order of a KV layout: must be tokens or heads; got ''"),
        ({"order": "layers"}, "order of a KV layout: must be tokens or heads; got 'layers'"),
        ({"item_bytes": 0}, "item_bytes"),
        ({"dtype": ""}, "dtype"),
        ({"dtype": "x" * 100}, "dtype"),
        ({"tp": 0}, "tp"),
        ({"tp": 3}, "4 KV heads do not divide by tp 3"),
        ({"pp": 0}, "pp"),
        ({"tp": 2**32 - 1}, "tp"),
        ({"regions": [region_of(2, 4096)]}, "rank .* must be 0 to 1; got 2"),
        ({"regions": [region_of(0, 4096)] * 33}, "may have 32 regions; got 33"),
        ({"regions": [region_of(1, 2048)]}, "rank 1: a block there has 4096 bytes; got 2048"),
    ],
)
def test_sizes_that_no_worker_has_are_an_error(change: dict[str, Any], why: str) -> None:
    assert parsed(hello_with_layout(regions=[region_of(1, 4096)])).regions[0].rank == 1
    with pytest.raises(ValueError, match=why):
        parsed(hello_with_layout(**change))


def test_workers_of_an_older_version_describe_no_kv() -> None:
    """Their regions are those of their only rank."""
    hello = prefill_pb2.HandoffHello(regions=[region_of(0, 7)])
    hello.MergeFromString(b"\x2a\x02ab")  # field 5: what they compared
    assert parsed(hello).layout is None
    assert parsed(hello).regions[0].rank == 0
    worker = membership_pb2.WorkerHello(role=membership_pb2.ROLE_DECODE)
    assert membership_codec.hello_from_proto(worker).layout is None


def load_with_steps(**steps: Any) -> m.WorkerLoad:
    return membership_codec.load_from_proto(
        membership_pb2.WorkerLoad(decode_steps=membership_pb2.LiveSteps(**steps))
    )


def test_worker_and_router_of_an_older_version_are_understood() -> None:
    load = membership_codec.load_from_proto(membership_pb2.WorkerLoad())
    assert load.prefill_steps is None
    assert load.decode_steps is None
    assert load.kv_paths == ()
    hello = membership_pb2.WorkerHello(
        role=membership_pb2.ROLE_DECODE,
        coefficients=membership_pb2.StepCoefficients(fixed_s=0.5),
    )
    state = membership_pb2.ClusterState(workers=[membership_pb2.WorkerState(hello=hello)])
    (worker,) = membership_codec.cluster_from_proto(state).workers
    assert worker.coefficients.fixed_s == 0.5
    assert worker.hello.hardware == ""


@pytest.mark.parametrize(
    "parse",
    [
        lambda: codec.router_message_from_proto(decode_pb2.RouterMessage()),
        lambda: codec.decode_message_from_proto(decode_pb2.DecodeMessage()),
        lambda: codec.from_decode_proto(prefill_pb2.DecodeToPrefill()),
        lambda: codec.from_prefill_proto(prefill_pb2.PrefillToDecode()),
        lambda: membership_codec.report_from_proto(membership_pb2.WorkerReport()),
        lambda: membership_codec.load_from_proto(
            membership_pb2.WorkerLoad(kv=membership_pb2.KvUsage(free=1, total=2))
        ),
        lambda: load_with_steps(num_steps=0, elapsed_s=1.0),
        lambda: load_with_steps(num_steps=1, elapsed_s=0.0),
        lambda: load_with_steps(num_steps=1, elapsed_s=float("nan")),
        lambda: load_with_steps(num_steps=1, elapsed_s=float("inf")),
        lambda: load_with_steps(num_steps=1, elapsed_s=1.0, relative_error=-1.0),
        lambda: load_with_steps(num_steps=1, elapsed_s=1.0, age_s=float("nan")),
    ],
)
def test_nonsense_from_a_peer_is_a_value_error(parse: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown|not a valid|add up|live steps"):
        parse()
