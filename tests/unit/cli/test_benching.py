import json
from pathlib import Path

import pytest

from pdserve.cli.benching import (
    Plan,
    lengths,
    render_report,
    report_as_json,
    run_bench,
    with_arrivals,
)
from pdserve.cli.plain_json import json_text
from pdserve.client.statistics import RequestRecord, Slo, summarise
from pdserve.client.values import Model
from pdserve.client.workload import TraceRequest, read_trace
from pdserve.domain.errors import LocalFault


def planned_requests(plan: Plan) -> tuple[TraceRequest, ...]:
    return with_arrivals(plan, lengths(plan))


def test_trace_gives_lengths_and_times() -> None:
    requests = planned_requests(Plan(trace="azure-code", num_requests=5, time_scale=2.0))
    assert [request.prompt_tokens for request in requests[:2]] == [4808, 3180]
    assert requests[1].arrival_s == pytest.approx(0.104)
    assert len(requests) == 5


def test_at_a_rate_requests_are_drawn_from_the_whole_trace() -> None:
    trace = read_trace("azure-conv")
    requests = planned_requests(Plan(trace="azure-conv", num_requests=4000, rate=10.0))
    assert 380 < requests[-1].arrival_s < 420
    mean = sum(request.output_tokens for request in trace) / len(trace)
    drawn = sum(request.output_tokens for request in requests) / len(requests)
    first = sum(request.output_tokens for request in trace[:4000]) / 4000
    assert abs(drawn - mean) < 0.05 * mean < abs(first - mean)  # it begins with longer answers
    again = planned_requests(Plan(trace="azure-conv", num_requests=4000, rate=10.0))
    assert again == requests
    assert (
        planned_requests(Plan(trace="azure-conv", num_requests=9, rate=10.0, seed=1))
        != (requests[:9])
    )


def test_the_conversation_trace_is_whole() -> None:
    requests = read_trace("azure-conv")
    assert len(requests) == 19_366
    assert (requests[0].prompt_tokens, requests[0].output_tokens) == (374, 44)
    assert requests[-1].arrival_s == pytest.approx(3501.7, abs=0.1)


def test_without_a_trace_all_requests_have_the_same_length() -> None:
    requests = planned_requests(Plan(num_requests=3, prompt_tokens=9, output_tokens=4))
    assert {(request.prompt_tokens, request.output_tokens) for request in requests} == {(9, 4)}


def test_report_of_a_failed_run_is_plain_json() -> None:
    record = RequestRecord(index=0, arrival_s=0.0, prompt_tokens=3, failure="UNREACHABLE")
    report = summarise([record], Slo(ttft_s=1.0), 2.0)
    model = Model(name="demo", max_context_tokens=100, vocab_size=10)
    text = json_text(report_as_json(report, Plan(), model))
    content = json.loads(text)
    assert content["ttft_s"]["50"] is None
    assert content["failures"] == {"UNREACHABLE": 1}
    assert content["attainment"] == 0.0
    assert len(render_report(report)) == 3


async def test_unwritable_result_file_is_told_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(LocalFault, match="No such file or directory"):
        await run_bench("127.0.0.1:1", Plan(), tmp_path / "none" / "result.json")


async def test_bad_trace_is_told_before_the_cluster_is_asked() -> None:
    with pytest.raises(LocalFault, match="no such trace file"):
        await run_bench("127.0.0.1:1", Plan(trace="none.csv"), None)
