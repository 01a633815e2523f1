import itertools
import json
from pathlib import Path

import pytest

from pdserve.client.workload import (
    FIRST_TEXT_TOKEN_ID,
    TraceRequest,
    fit_to_context,
    make_prompt,
    read_trace,
    scale_time,
    with_poisson_arrivals,
)
from pdserve.domain.errors import LocalFault


def write(tmp_path: Path, text: str, name: str = "trace.csv") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_packaged_azure_trace_has_its_first_thousand_requests() -> None:
    requests = read_trace("azure-code")
    assert len(requests) == 1000
    assert requests[0] == TraceRequest(0.0, 4808, 10)
    assert requests[1].arrival_s == pytest.approx(0.052)
    assert (requests[1].prompt_tokens, requests[1].output_tokens) == (3180, 8)


def test_code_trace_is_packaged_whole_too() -> None:
    whole = read_trace("azure-code-all")
    assert len(whole) == 8819
    assert whole[:1000] == read_trace("azure-code")


def test_azure_columns_with_windows_line_ends_and_zones_are_read(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2024-05-10 00:00:01.9799600+00:00,5,6\r\n"
        "2024-05-10 00:00:00+00:00,3,4\r\n"
    )
    first, second = read_trace(write(tmp_path, text))
    assert first == TraceRequest(0.0, 3, 4)
    assert second.arrival_s == pytest.approx(1.97996)


def test_plain_csv_and_jsonl_mean_the_same(tmp_path: Path) -> None:
    rows = [(10.0, 7, 2), (10.5, 8, 1)]
    table = "arrival_s,prompt_tokens,output_tokens\n"
    table += "".join(f"{arrival},{prompt},{output}\n" for arrival, prompt, output in rows)
    names = ("arrival_s", "prompt_tokens", "output_tokens")
    lines = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    expected = (TraceRequest(0.0, 7, 2), TraceRequest(0.5, 8, 1))
    assert read_trace(write(tmp_path, table)) == expected
    assert read_trace(write(tmp_path, lines, "trace.jsonl")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: expected the columns"),
        ("a,b\n1,2\n", ":1: expected the columns"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no requests"),
        (
            "arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,x,1\n",
            ":3: prompt_tokens: expected a whole number, 1 or more; got 'x'",
        ),
        ("arrival_s,prompt_tokens,output_tokens\n0,1\n", ":2: expected 3 cells, got 2"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,1,1\n", ":2: arrival_s: expected a number"),
        ("arrival_s,prompt_tokens,output_tokens\n-1,1,1\n", ":2: arrival_s: expected a number"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,0\n", ":2: output_tokens: expected a whole"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n", ":2: TIMESTAMP: expected a time"),
        ('{"arrival_s": 0, "prompt_tokens": 1}\n', ":1: output_tokens missing"),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}\n{oops\n', ":2: not JSON"),
        ('{"arrival_s": 0, "prompt_tokens": true, "output_tokens": 1}\n', ":1: prompt_tokens"),
        ('{"arrival_s": 0, "prompt_tokens": 1.5, "output_tokens": 1}\n', ":1: prompt_tokens"),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}\n[1]\n', ":2: expected a JSON"),
    ],
)
def test_bad_trace_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(LocalFault) as caught:
        read_trace(path)
    assert message in caught.value.message
    assert caught.value.message.startswith(path)


def test_missing_and_binary_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalFault, match="no such trace file; packaged traces: azure-code"):
        read_trace(str(tmp_path / "none.csv"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LocalFault, match="not UTF-8 at byte 0"):
        read_trace(str(tmp_path / "binary.csv"))
    with pytest.raises(LocalFault, match="directory"):
        read_trace(str(tmp_path))


def test_lengths_that_fit_stay_as_they_are() -> None:
    requests = (TraceRequest(0.0, 60, 25), TraceRequest(1.0, 75, 25))
    assert fit_to_context(requests, 100) == requests


def test_lengths_shrink_by_one_factor_until_the_largest_fits() -> None:
    requests = (TraceRequest(0.0, 750, 90), TraceRequest(1.0, 100, 5), TraceRequest(2.0, 1, 1))
    fitted = fit_to_context(requests, 100)
    # Outputs are cut at 25; 750 * 0.1 + 25 = 100, and the others shrink by the same 0.1.
    assert fitted == (TraceRequest(0.0, 75, 25), TraceRequest(1.0, 10, 5), TraceRequest(2.0, 1, 1))


def test_azure_trace_fits_small_contexts() -> None:
    for limit in (8, 100, 1024, 4096):
        for request in fit_to_context(read_trace("azure-code"), limit):
            assert request.prompt_tokens >= 1
            assert request.output_tokens >= 1
            assert request.prompt_tokens + request.output_tokens <= limit


def test_time_scale_multiplies_arrivals() -> None:
    requests = (TraceRequest(0.0, 1, 1), TraceRequest(8.0, 1, 1))
    assert [request.arrival_s for request in scale_time(requests, 0.25)] == [0.0, 2.0]


def test_poisson_arrivals_have_the_rate_and_repeat_with_the_seed() -> None:
    requests = (TraceRequest(0.0, 3, 4),) * 4000
    placed = with_poisson_arrivals(requests, rate=5.0, seed=3)
    assert placed == with_poisson_arrivals(requests, rate=5.0, seed=3)
    assert placed != with_poisson_arrivals(requests, rate=5.0, seed=4)
    gaps = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(placed)]
    mean = sum(gaps) / len(gaps)
    # Both of a Poisson process: mean gap 1 / rate, and as much spread as mean.
    assert mean == pytest.approx(0.2, rel=0.05)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread == pytest.approx(mean, rel=0.07)


def test_prompts_have_the_wanted_length_and_stay_in_the_vocabulary() -> None:
    prompt = make_prompt(500, vocab_size=64, seed=1)
    assert len(prompt) == 500
    assert set(prompt) <= set(range(FIRST_TEXT_TOKEN_ID, 64))
    assert prompt == make_prompt(500, vocab_size=64, seed=1)
    assert prompt != make_prompt(500, vocab_size=64, seed=2)
    assert set(make_prompt(50, vocab_size=4, seed=1)) <= set(range(4))
