"""Who follows a log sees every line of it, rotated or not."""

from pathlib import Path

import pytest

from deploy.log_follower import LogFollower
from pdserve.observe.log_sinks import RotatingFile


def test_every_line_is_read_through_rotations(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    follower = LogFollower(path)
    assert follower.read(1 << 20) == b""
    file = RotatingFile(path, max_bytes=100, num_files=3)
    read = b""
    for index in range(50):
        file.write(memoryview(f"line {index}\n".encode()))
        if index % 7 == 6:
            while chunk := follower.read(10):
                read += chunk
    while chunk := follower.read(10):
        read += chunk
    assert read.decode().splitlines() == [f"line {index}" for index in range(50)]
    follower.close()
    file.close()


def test_file_that_was_emptied_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("a long line\n")
    follower = LogFollower(path)
    assert follower.read(100) == b"a long line\n"
    path.write_text("short\n")
    assert follower.read(100) == b"short\n"
    follower.close()


@pytest.mark.parametrize("path", ["/no/such/folder/x.log", "/proc"])
def test_file_that_cannot_be_read_has_nothing_new(path: str) -> None:
    assert LogFollower(Path(path)).read(100) == b""
