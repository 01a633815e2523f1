"""Telling our own CPU use from that of others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.machine_load import TICKS_PER_S, LoadMeter, cpu_s, families

OURS, OTHER = 41, 42


class Machine:
    """A /proc of files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.busy_s = 100.0
        self.own_s = {os.getpid(): 1.0, OURS: 2.0}
        self.write()

    def write(self) -> None:
        ticks = round(self.busy_s * TICKS_PER_S)
        (self.folder / "stat").write_text(f"cpu  {ticks} 0 0 999 7 0 0 0 5 0\ncpu0 1\n")
        for pid, seconds in self.own_s.items():
            path = self.folder / str(pid)
            path.mkdir(exist_ok=True)
            user = round(seconds * TICKS_PER_S)
            (path / "stat").write_text(f"{pid} (a) name) S {'0 ' * 10}{user} 0 0 0\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("deploy.machine_load.time.monotonic", lambda: now[0])
    return now


def test_what_we_use_is_not_foreign(machine: Machine, clock: list[float]) -> None:
    meter = LoadMeter([OURS], proc=machine.folder)
    clock[0], machine.busy_s = 10.0, 115.0
    machine.own_s = {os.getpid(): 3.0, OURS: 7.0}
    machine.write()
    assert meter.foreign_cores() == pytest.approx((15.0 - 7.0) / 10.0)


def test_idle_time_and_guests_do_not_count(machine: Machine, clock: list[float]) -> None:
    meter = LoadMeter([], proc=machine.folder)
    clock[0] = 10.0
    assert meter.foreign_cores() == 0.0


def test_machine_that_does_not_tell_gives_none(tmp_path: Path) -> None:
    assert LoadMeter([], proc=tmp_path / "none").foreign_cores() is None


def test_process_that_ended_has_used_nothing(machine: Machine) -> None:
    found = cpu_s({"ours": OURS, "gone": OTHER}, proc=machine.folder)
    assert found == {"ours": pytest.approx(2.0), "gone": 0.0}


def test_ranks_of_a_worker_belong_to_its_family() -> None:
    script = "import os; pid = os.fork(); pid and print(pid, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert set(families([parent.pid])) == {parent.pid, child}
        assert families([]) == ()
        parent.communicate("\n\n")
    assert families([parent.pid]) == (parent.pid,)
