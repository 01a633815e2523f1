"""Runs the parts of the check, each in a process of its own, within a budget of time.

A process of its own, because after an illegal access of memory a process can do nothing more on a
GPU, and because a part that hangs can be ended.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.gpu_check.findings import Finding
from bench.gpu_check.parts import Part

_LEAST_S = 5.0  # no part does anything in less
_ERROR_CHARS = 1500
_CPU_FACTOR = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one part; what it had found before it failed counts."""

    part: Part
    findings: tuple[Finding, ...] = ()
    elapsed_s: float = 0.0
    left_out: str = ""  # why it did not run
    failure: str = ""  # why it did not end well

    @property
    def is_good(self) -> bool:
        return not self.failure and all(each.is_good is not False for each in self.findings)


@dataclass(kw_only=True)
class Budget:
    """Seconds that are left to all parts together."""

    total_s: float
    began_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.total_s - (time.monotonic() - self.began_s)


def part_command(part: Part, device: str) -> list[str]:
    """What measures a part and prints its findings."""
    return [sys.executable, "-m", "bench.gpu_check", "--device", device, "--part", part.name]


def run_parts(
    parts: Sequence[Part],
    device: str,
    budget: Budget,
    tell: Callable[[str], None],
    command_of: Callable[[Part, str], list[str]] = part_command,
) -> list[Outcome]:
    """In order. Parts for which packages, a GPU or time are missing are left out, and told so."""
    outcomes = []
    for part in parts:
        tell(f"\n== {part.name}: {part.answers}")
        reason = _obstacle(part, device, budget)
        if reason:
            outcome = Outcome(part=part, left_out=reason)
            tell(f"left out: {reason}")
        else:
            # Nobody waits for a GPU meanwhile, and interpreted kernels on a busy machine are slow.
            most_s = part.most_s * (_CPU_FACTOR if device == "cpu" else 1)
            limit_s = min(most_s, budget.left_s)
            outcome = _run(part, command_of(part, device), _environment(device), limit_s, tell)
            verdict = "passed" if outcome.is_good else f"FAILED {outcome.failure}".rstrip()
            tell(f"{verdict} in {outcome.elapsed_s:.0f} s")
        outcomes.append(outcome)
    return outcomes


def _obstacle(part: Part, device: str, budget: Budget) -> str:
    if missing := part.missing():
        return f"not installed: {', '.join(missing)}"
    if part.needs_gpu and device == "cpu":
        return "needs a GPU"
    if budget.left_s < _LEAST_S:
        return "no time left"
    return ""


def _run(
    part: Part,
    command: Sequence[str],
    environment: dict[str, str],
    limit_s: float,
    tell: Callable[[str], None],
) -> Outcome:
    began_s = time.monotonic()
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # what it starts is ended with it
    )
    errors: list[str] = []
    assert child.stdout is not None
    assert child.stderr is not None
    reader = threading.Thread(target=_drain, args=(child.stderr, errors), daemon=True)
    reader.start()
    is_late = threading.Event()
    timer = threading.Timer(limit_s, _end, (child, is_late))
    timer.start()
    findings = []
    try:
        for line in child.stdout:
            if (finding := Finding.of_line(line)) is not None:
                findings.append(finding)
                tell(f"{_mark(finding)}{finding.what}: {finding.value_text} {finding.unit}"
                     f"{'  ' if finding.note else ''}{finding.note}")  # fmt: skip
        code = child.wait()
    finally:
        timer.cancel()
        _end(child)
    reader.join(5)
    failure = ""
    if is_late.is_set():
        failure = f"ended after {limit_s:.0f} s"
    elif code != 0:
        failure = f"exit code {code}: {''.join(errors)[-_ERROR_CHARS:].strip()}"
    elapsed_s = time.monotonic() - began_s
    return Outcome(part=part, findings=tuple(findings), elapsed_s=elapsed_s, failure=failure)


def _mark(finding: Finding) -> str:
    return {None: "   ", True: "ok ", False: "NO "}[finding.is_good]


def _environment(device: str) -> dict[str, str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    return environment


def _drain(stream: object, lines: list[str]) -> None:
    for line in stream:  # type: ignore[attr-defined]
        lines.append(line)
        del lines[:-200]


def _end(child: "subprocess.Popen[str]", is_late: threading.Event | None = None) -> None:
    """Kill it and what it has started, which is a process group."""
    if is_late is not None:
        is_late.set()
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
