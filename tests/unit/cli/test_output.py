"""Commands print to any stream: without UTF-8, without room, without a reader."""

import json
import os
import subprocess
import sys

import pytest

TEXT = "\u65e5\u672c caf\u00e9 \u2588\u2591 \ud83d\udca9 \ud800"
SAYS = f"""
import sys
from pdserve.cli.output import command_output
with command_output():
    print({TEXT!a})
    print({TEXT!a}, file=sys.stderr)
    from rich.console import Console
    Console().print("[bold]\\u2500\\u2588[/bold]")
    sys.exit(7)
"""
ENVIRONMENTS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "utf-8"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C"},
]


def run(code: str, env: dict[str, str], **options: object) -> "subprocess.CompletedProcess[bytes]":
    given: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, **given)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_what_a_stream_cannot_encode_is_escaped(env: dict[str, str]) -> None:
    done = run(SAYS, env)
    assert done.returncode == 7, done.stderr
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    said = done.stdout.decode(encoding)
    assert "\\ud800" in said
    assert done.stderr.decode(encoding) == said.splitlines()[0] + "\n"
    if encoding == "ascii":
        assert said.splitlines()[0] == "\\u65e5\\u672c caf\\xe9 #- \\ud83d\\udca9 \\ud800"


LOSES = """
import sys
from pdserve.cli.output import command_output
with command_output():
    for _ in range(100_000):
        print("line")
"""


def test_full_disk_is_told_in_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = run(LOSES, {}, stdout=full)
    assert done.returncode == 1
    assert done.stderr.decode() == ("pdserve: cannot write the output: No space left on device\n")


def test_last_words_that_a_full_disk_does_not_take_are_told_too() -> None:
    with open("/dev/full", "wb") as full:
        done = run(SAYS, {}, stdout=full)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_reader_that_goes_away_ends_the_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run(LOSES, {}, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_closed_streams_are_no_matter() -> None:
    closing = ["sh", "-c", 'exec "$0" "$@" >&- 2>&-', sys.executable, "-c", SAYS]
    assert subprocess.run(closing, check=False).returncode == 7


LASTS = """
import json, os, sys
from pdserve.cli.output import lasting_output
with lasting_output():
    for number in range(20_000):
        print("line", number)
        print("line", number, file=sys.stderr)
os.write(int(sys.argv[1]), json.dumps("done").encode())
"""


@pytest.mark.parametrize("is_read", [True, False])
def test_command_that_serves_outlives_its_readers(is_read: bool) -> None:
    """A pipe that is full, or closed, holds nothing up."""
    reading, writing = os.pipe()
    done_reading, done_writing = os.pipe()
    if not is_read:
        os.close(reading)
    process = subprocess.Popen(
        [sys.executable, "-c", LASTS, str(done_writing)],
        stdout=writing,
        stderr=writing,
        pass_fds=[done_writing],
    )
    os.close(writing)
    os.close(done_writing)
    assert process.wait(60) == 0
    assert json.loads(os.read(done_reading, 100)) == "done"
    if is_read:  # at last: it had to do without
        assert os.read(reading, 20).startswith(b"line 0\n")
        os.close(reading)
    os.close(done_reading)
