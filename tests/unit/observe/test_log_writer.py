"""Lines go through a queue of bounded size: no sink, however it behaves, harms whoever logs."""

import errno
import os
import threading
import time
from collections.abc import Iterator

import pytest

from pdserve.observe.log_writer import LogStream, LogWriter
from tests.support.waiting import wait_until

RETRY_S = 0.01


class Disk:
    """Takes lines unless it is full; while `is_stuck` a write does not return."""

    def __init__(self) -> None:
        self.written = b""
        self.room = 1 << 30
        self.is_moving = threading.Event()
        self.is_moving.set()

    def write(self, data: memoryview) -> int:
        self.is_moving.wait()
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = min(len(data), self.room)
        self.room -= taken
        self.written += bytes(data[:taken])
        return taken

    def tidy(self) -> None:
        """Nothing to do."""

    @property
    def lines(self) -> list[str]:
        return self.written.decode().splitlines()


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def writer(disk: Disk) -> Iterator[LogWriter]:
    writer = LogWriter(disk, notice, max_num_lines=10, max_bytes=200, retry_s=RETRY_S)
    yield writer
    disk.is_moving.set()
    writer.close(5.0)


def notice(count: int, why: str) -> bytes:
    return f"{count} dropped: {why}\n".encode()


def line(index: int) -> bytes:
    return f"line {index}\n".encode()


def test_lines_are_written_in_order(disk: Disk, writer: LogWriter) -> None:
    for index in range(1000):
        writer.put(line(index))
        if index % 10 == 9:
            assert writer.flush(5.0)
    assert disk.lines == [f"line {index}" for index in range(1000)]
    assert writer.num_dropped == 0


def test_full_disk_drops_and_counts_and_says_so_later(disk: Disk, writer: LogWriter) -> None:
    disk.room = 0
    for index in range(5):
        writer.put(line(index))
    assert writer.flush(5.0)
    assert writer.num_dropped == 5
    disk.room = 1 << 30
    writer.put(b"more\n")
    assert writer.flush(5.0)
    assert disk.lines == ["5 dropped: No space left on device", "more"]
    assert writer.num_dropped == 5


async def test_what_was_dropped_is_told_even_if_nothing_more_is_logged(
    disk: Disk, writer: LogWriter
) -> None:
    disk.room = 0
    writer.put(line(0))
    assert writer.flush(5.0)
    disk.room = 1 << 30
    told = ["1 dropped: No space left on device"]
    await wait_until(lambda: disk.lines == told, within_s=5, what="the notice is written")


def test_line_that_a_full_disk_cut_does_not_spoil_the_next(disk: Disk, writer: LogWriter) -> None:
    disk.room = 3
    writer.put(line(0))
    assert writer.flush(5.0)
    disk.room = 1 << 30
    writer.put(line(1))
    assert writer.flush(5.0)
    assert disk.lines == ["lin", "1 dropped: No space left on device", "line 1"]


async def test_stuck_disk_holds_nobody_up(disk: Disk, writer: LogWriter) -> None:
    disk.is_moving.clear()
    started_s = time.monotonic()
    for index in range(1000):
        writer.put(line(index))
    assert time.monotonic() - started_s < 1.0
    assert not writer.flush(0.01)
    assert 900 < writer.num_dropped < 1000
    disk.is_moving.set()
    assert writer.flush(5.0)
    told = f"{writer.num_dropped} dropped: written too slowly"
    await wait_until(lambda: told in disk.lines, within_s=5, what="the notice is written")
    assert len(disk.lines) == 1000 - writer.num_dropped + 1


def test_queue_is_bounded_by_bytes_too(disk: Disk, writer: LogWriter) -> None:
    disk.is_moving.clear()
    writer.put(b"x" * 500 + b"\n")
    assert writer.num_dropped == 1


def test_sink_that_breaks_in_any_way_ends_nothing(disk: Disk, writer: LogWriter) -> None:
    write, disk.write = disk.write, lambda data: 1 // 0  # type: ignore[method-assign]
    writer.put(line(0))
    assert writer.flush(5.0)
    disk.write = write  # type: ignore[method-assign]
    writer.put(line(1))
    assert writer.flush(5.0)
    assert disk.lines == ["1 dropped: ZeroDivisionError", "line 1"]


def test_close_writes_what_is_queued_and_waits_no_longer_than_told(
    disk: Disk, writer: LogWriter
) -> None:
    writer.put(line(0))
    writer.close(5.0)
    assert disk.lines == ["line 0"]
    stuck = Disk()
    stuck.is_moving.clear()
    other = LogWriter(stuck, notice)
    other.put(line(0))
    started_s = time.monotonic()
    other.close(0.05)
    assert time.monotonic() - started_s < 2.0
    stuck.is_moving.set()


def test_finalizer_may_log_while_a_line_is_put(disk: Disk, writer: LogWriter) -> None:
    with writer._changed:
        writer.put(line(0))
    assert writer.flush(5.0)
    assert disk.lines == ["line 0"]


def test_stream_passes_whole_lines_and_escapes_what_cannot_be_encoded(
    disk: Disk, writer: LogWriter
) -> None:
    stream = LogStream(writer, 2, encoding="ascii")
    print("caf\u00e9", "\ud800", file=stream)
    stream.write("begun")
    assert writer.flush(5.0)
    assert disk.lines == ["caf\\xe9 \\ud800"]
    stream.flush()
    assert writer.flush(5.0)
    assert disk.lines[1] == "begun"
