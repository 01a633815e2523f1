"""`pdserve` as a person runs it: commands as processes, and a cluster that `up` started."""

import json
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from functools import cached_property
from typing import IO, Any

import psutil

TIMED = [
    *("--set", "engine=timed"),
    *("--set", "coefficients={fixed_s: 0.001, prefill_token_s: 0.0001, decode_token_s: 0.001}"),
    *("--port", "0", "--internal-port", "0"),
]
START_S = 40.0
END_S = 20.0
MARK = "PDSERVE_TEST_RUN"
NO_ENV: Mapping[str, str] = {}


class Up:
    """One run of `pdserve up --json`; `mark` finds every process that it started."""

    def __init__(self, *options: str, env: Mapping[str, str] = NO_ENV) -> None:
        self.mark = uuid.uuid4().hex
        self.child = subprocess.Popen(
            pdserve_command("up", "--json", *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # what is not read yet stays where `select` sees it
            env={**os.environ, **env, MARK: self.mark},
            start_new_session=True,
        )

    @cached_property
    def said(self) -> dict[str, Any]:
        """Its line of JSON, once it comes."""
        assert self.child.stdout is not None
        wait_readable(self.child.stdout, START_S)
        said = json.loads(self.child.stdout.readline())
        assert isinstance(said, dict)
        return said

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Signal it; its exit code and what it wrote to stderr."""
        self.child.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        said, errors = self.child.communicate(timeout=END_S)
        if "said" not in self.__dict__:
            self.said = json.loads(said or b"{}")
        return self.child.returncode, errors.decode()

    def read_errors(self, *, until: str) -> str:
        """What it wrote to stderr up to the line that has `until`."""
        assert self.child.stderr is not None
        said = ""
        while until not in said:
            wait_readable(self.child.stderr, END_S)
            line = self.child.stderr.readline().decode()
            assert line, f"it ended without {until!r}: {said}"
            said += line
        return said

    def pid_of(self, name: str) -> int:
        return next(int(each["pid"]) for each in self.said["processes"] if each["name"] == name)

    def left(self) -> list[str]:
        """Command lines of the processes that still run."""
        return [
            " ".join(process.info["cmdline"] or ["?"])
            for process in psutil.process_iter(["environ", "cmdline", "status"])
            if (process.info["environ"] or {}).get(MARK) == self.mark
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    def kill_all(self) -> None:
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get(MARK) == self.mark:
                process.kill()
        self.child.wait(END_S)


def wait_readable(stream: IO[bytes], within_s: float) -> None:
    readable, _, _ = select.select([stream], [], [], within_s)
    assert readable, f"nothing to read within {within_s} s"


def pdserve_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pdserve.cli", *arguments]


def pdserve(
    *arguments: str,
    cluster: Up | None = None,
    stdin: bytes = b"",
    env: Mapping[str, str] = NO_ENV,
) -> subprocess.CompletedProcess[bytes]:
    addresses = {}
    if cluster is not None:
        addresses["PDSERVE_ADDRESS"] = cluster.said["address"]
        addresses["PDSERVE_INTERNAL_ADDRESS"] = cluster.said["internal_address"]
    return subprocess.run(
        pdserve_command(*arguments),
        input=stdin,
        capture_output=True,
        timeout=60,
        env={**os.environ, **addresses, **env},
    )


def error_line(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line of an error; no traceback."""
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("pdserve: ")
    return lines[0]
