import errno
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from pdserve.observe.logging import PRIVATE_FIELDS, configure_logging, num_dropped_lines

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


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_event_that_cannot_be_rendered_is_counted_and_harms_nobody() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    log, before = structlog.get_logger(), num_dropped_lines()
    log.info("x.happened", value=Unprintable())
    log.bind(value=Unprintable()).error("x.failed")
    log.info("x.happened", value="caf\u00e9 \ud800")
    assert num_dropped_lines() == before + 2
    assert logged(stream)[0]["value"] == "caf\u00e9 \ud800"


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, text)


def test_stream_that_takes_no_more_harms_nobody() -> None:
    configure_logging(stream=Full(), as_json=True)
    before = num_dropped_lines()
    structlog.get_logger().warning("x.happened")
    assert num_dropped_lines() == before + 1


PROCESS = """
import sys, structlog
from pathlib import Path
from pdserve.observe.log_sinks import RotatingFile
from pdserve.observe.logging import num_dropped_lines, process_log
file = RotatingFile(Path(sys.argv[1]), max_bytes=1 << 16, num_files=2, is_stderr=True)
with process_log(level="info", file=file):
    structlog.get_logger().info("x.happened", number=1)
    print("printed", file=sys.stderr)
    raise SystemExit(num_dropped_lines())
"""


def test_events_and_what_is_printed_share_the_file_and_are_written_before_the_end(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.log"
    done = subprocess.run([sys.executable, "-c", PROCESS, str(path)], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    event, printed = path.read_text().splitlines()
    assert json.loads(event)["number"] == 1
    assert printed == "printed"
