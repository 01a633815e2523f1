import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from pdserve.observe.logging import PRIVATE_FIELDS, configure_logging

CANARY = "canary-prompt"


@pytest.fixture(autouse=True)
def default_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def logged(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_event_is_one_json_line_with_level_time_and_context() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    structlog.contextvars.bind_contextvars(worker_id="prefill-0")
    structlog.get_logger().info("kv.landed", num_blocks=3, note="two\nlines")
    (event,) = logged(stream)
    assert event["event"] == "kv.landed"
    assert (event["level"], event["worker_id"], event["num_blocks"]) == ("info", "prefill-0", 3)
    assert event["timestamp"].endswith("Z")
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize(("level", "expected"), [("debug", 4), ("warning", 2), ("error", 1)])
def test_level_hides_what_is_below_it(level: str, expected: int) -> None:
    stream = io.StringIO()
    configure_logging(level=level, stream=stream)
    log = structlog.get_logger()
    for write in (log.debug, log.info, log.warning, log.error):
        write("x.happened")
    assert len(logged(stream)) == expected


@pytest.mark.parametrize("as_json", [True, False])
def test_fields_that_could_hold_a_prompt_are_hidden(as_json: bool) -> None:
    stream = io.StringIO()
    configure_logging(as_json=as_json, stream=stream)
    structlog.get_logger().info("x.happened", **dict.fromkeys(PRIVATE_FIELDS, CANARY))
    assert CANARY not in stream.getvalue()
    assert stream.getvalue().count("(hidden)") == len(PRIVATE_FIELDS)


@pytest.mark.parametrize("as_json", [True, False])
def test_tracebacks_show_no_local_variables(as_json: bool) -> None:
    stream = io.StringIO()
    configure_logging(as_json=as_json, stream=stream)
    held = "-".join(["canary", "prompt"])
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger().exception("x.failed")
    assert "ValueError: broken" in stream.getvalue()
    assert held not in stream.getvalue()


def test_no_terminal_means_json() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    structlog.get_logger().info("x.happened")
    assert logged(stream)[0]["event"] == "x.happened"
