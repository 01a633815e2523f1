import dataclasses
import io
import json
from dataclasses import replace

from rich.console import Console

from pdserve.cli.status_view import render_state, state_as_json
from pdserve.domain.ids import WorkerId
from pdserve.domain.kv_usage import KvUsage
from pdserve.domain.latency import LiveSteps, StepShape
from pdserve.domain.messages import (
    ClusterState,
    KvMoved,
    KvPath,
    Role,
    SloState,
    WorkerState,
)
from tests.unit.router.builders import make_hello, make_load


def worker(worker_id: str, role: Role) -> WorkerState:
    hello = make_hello(
        worker_id,
        role,
        address="127.0.0.1:4444",
        pid=77,
        model_hash=b"\x01\xff",
        num_blocks=10,
    )
    load = make_load(
        num_waiting=3,
        num_running=2,
        kv=KvUsage(free=1, reserved=2, held=3, pinned=4, total=10),
    )
    return WorkerState(
        hello=hello,
        load=load,
        health="alive",
        silence_s=0.25,
        num_assigned=2,
        coefficients=replace(hello.coefficients, fixed_s=0.0125, decode_token_s=0.00025),
    )


def state(*workers: WorkerState) -> ClusterState:
    return ClusterState(
        router_id="router-0",
        model_name="demo",
        public_address="127.0.0.1:7450",
        uptime_s=7300.0,
        num_completed=5,
        workers=workers,
    )


def rendered(shown: ClusterState, *, width: int, is_wide: bool) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render_state(shown, is_wide=is_wide))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_workers_are_shown_with_load_and_every_state_of_a_block() -> None:
    shown = state(worker("prefill-0", Role.PREFILL), worker("decode-0", Role.DECODE))
    text = rendered(shown, width=120, is_wide=True)
    rows = [line.split() for line in text.splitlines() if "127.0.0.1:4444" in line]
    assert [row[0] for row in rows] == ["decode-0", "prefill-0"]
    assert rows[0][1:9] == ["alive", "2", "3", "1", "2", "3", "4", "10"]
    assert rows[0][-1] == "77"
    assert "up 2.0 h" in text
    assert "5 completed" in text


def test_narrow_terminal_cuts_nothing() -> None:
    text = rendered(state(worker("prefill-10", Role.PREFILL)), width=80, is_wide=False)
    assert "…" not in text
    assert "reserved" in text


def test_cluster_without_workers_says_so() -> None:
    assert "no worker is registered" in rendered(state(), width=80, is_wide=False)


def test_state_as_json_is_plain_with_hashes_in_hexadecimal() -> None:
    content = json.loads(json.dumps(state_as_json(state(worker("decode-0", Role.DECODE)))))
    assert content["workers"][0]["hello"]["model_hash"] == "01ff"
    assert content["workers"][0]["load"]["kv"]["pinned"] == 4
    assert content["workers"][0]["hello"]["role"] == "decode"


def test_corrupt_blocks_are_told() -> None:
    healthy = worker("decode-0", Role.DECODE)
    load = dataclasses.replace(healthy.load, num_corrupt_blocks=3)
    sick = dataclasses.replace(healthy, load=load)
    assert "digests" not in rendered(state(healthy), width=120, is_wide=True)
    assert "decode-0 read 3 KV blocks" in rendered(state(sick), width=120, is_wide=True)


def test_how_kv_is_read_is_told_for_each_pair_and_why() -> None:
    decode = worker("decode-0", Role.DECODE)
    why = "shm failed (the peer died while it was read) and is tried again in 12 s"
    paths = [
        KvPath(
            worker_id=WorkerId("prefill-1"),
            transport="tcp",
            why=why,
            num_fallbacks=2,
            moved=KvMoved(moved_bytes=3 << 30, skipped_bytes=5 << 40, retried_bytes=1536),
        ),
        KvPath(worker_id=WorkerId("prefill-0"), transport="shm", why="[any]", num_fallbacks=0),
    ]
    linked = replace(decode, load=replace(decode.load, kv_paths=tuple(paths)))
    rows = rendered(state(linked), width=160, is_wide=True).splitlines()
    told = [row.split() for row in rows if " prefill-" in row]
    assert " ".join(told[0]) == "decode-0 prefill-0 shm 0 KiB 0 KiB 0 KiB 0 [any]"
    assert " ".join(told[1]) == (f"decode-0 prefill-1 tcp 3,072 MiB 5,120 GiB 1.5 KiB 2 {why}")
    assert "KV read by" not in rendered(state(decode), width=120, is_wide=True)


def test_attainment_is_shown_by_class_where_there_are_classes() -> None:
    chat = SloState(
        name="chat",
        ttft_s=0.5,
        tpot_s=0.05,
        target=0.9,
        num_met=6,
        num_missed_ttft=1,
        num_missed_both=1,
        num_failed=1,
        num_refused=3,
    )
    unused = SloState(name="[batch]", ttft_s=20, tpot_s=1, target=0.5)
    with_classes = dataclasses.replace(state(worker("d", Role.DECODE)), slo=(chat, unused))
    rows = rendered(with_classes, width=80, is_wide=False).splitlines()
    (shown,) = [row.split() for row in rows if row.strip().startswith("chat")]
    # Attained, judged, late, slow, failed, refused.
    assert shown == ["chat", "500", "ms,", "50", "ms,", "0.9", "50.0%", "12", "2", "1", "1", "3"]
    (empty,) = [row.split() for row in rows if row.strip().startswith("[batch]")]
    assert empty[-6:] == ["-", "0", "0", "0", "0", "0"]
    assert "attained" not in rendered(state(worker("d", Role.DECODE)), width=80, is_wide=False)


def test_ranks_and_devices_are_shown_where_any_are_out_of_the_ordinary() -> None:
    plain = worker("decode-0", Role.DECODE)
    layout = plain.hello.layout
    assert layout is not None
    cut = replace(layout, tp=1, pp=len(layout.whole.layers))
    hello = replace(plain.hello, layout=cut, hardware="cuda, x86_64, 8 CPUs, bfloat16")
    many = replace(plain, hello=replace(hello, worker_id=WorkerId("decode-1")))
    rows = rendered(state(plain, many), width=120, is_wide=True).splitlines()
    (head,) = (line.split() for line in rows if "step times" in line)
    assert head[-2:] == ["ranks", "device"]
    ends = {line.split()[0]: line.split()[-2:] for line in rows if " us" in line}
    assert ends == {"decode-0": ["1", "cpu"], "decode-1": [str(cut.num_ranks), "cuda"]}
    assert "ranks" not in rendered(state(plain), width=120, is_wide=True)
    assert "ranks" not in rendered(state(many), width=80, is_wide=False)


def test_step_times_believed_and_measured_are_shown() -> None:
    plain = worker("decode-0", Role.DECODE)
    steps = LiveSteps(
        num_steps=10,
        shape=StepShape(num_decodes=20, num_decode_context_tokens=2000),
        elapsed_s=2
        * plain.hello.coefficients.steps_s(
            10, StepShape(num_decodes=20, num_decode_context_tokens=2000)
        ),
        relative_error=0.1,
        age_s=1.0,
    )
    busy = dataclasses.replace(plain, load=replace(plain.load, decode_steps=steps))
    for width, is_wide in ((80, False), (120, True)):
        lines = rendered(state(plain, busy), width=width, is_wide=is_wide).splitlines()
        _, idle_row, busy_row = (
            line.split() for line in lines if "step times" in line or " us" in line
        )
        # Each step, a prompt token, a request, 1,000 tokens of context; prefill, decode.
        assert idle_row[1:] == ["12.50", "ms", "1.00", "ms", "250", "us", "10.00", "ms", "-", "-"]
        assert busy_row[-3:] == ["-", "2.00", "x"]
    shown = json.loads(json.dumps(state_as_json(state(busy))))["workers"][0]
    assert shown["coefficients"]["decode_token_s"] == 0.00025
    assert shown["load"]["decode_steps"]["num_steps"] == 10
    assert shown["load"]["prefill_steps"] is None
