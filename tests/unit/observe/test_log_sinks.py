"""Log files stay within their limits; pipes that nobody reads make nobody wait."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdserve.observe.log_sinks import (
    DescriptorSink,
    RotatingFile,
    reopen_without_blocking,
    rotated_paths,
)


def open_log(folder: Path, *, num_files: int = 3) -> RotatingFile:
    return RotatingFile(folder / "x.log", max_bytes=100, num_files=num_files)


def write(file: RotatingFile, text: str) -> None:
    data = text.encode()
    assert file.write(memoryview(data)) == len(data)


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_full_file_is_renamed_and_the_oldest_goes(tmp_path: Path) -> None:
    file = open_log(tmp_path)
    for letter in "abcdefgh":
        write(file, letter * 60)
    assert texts(tmp_path) == {"x.log": "h" * 60, "x.log.1": "g" * 60, "x.log.2": "f" * 60}
    file.close()


def test_lines_share_a_file_as_long_as_they_fit(tmp_path: Path) -> None:
    file = open_log(tmp_path)
    for letter in "abc":
        write(file, letter * 50)
    assert texts(tmp_path) == {"x.log": "c" * 50, "x.log.1": "a" * 50 + "b" * 50}
    file.close()


def test_only_file_is_emptied(tmp_path: Path) -> None:
    file = open_log(tmp_path, num_files=1)
    for letter in "abc":
        write(file, letter * 60)
    assert texts(tmp_path) == {"x.log": "c" * 60}
    file.close()


def test_file_of_an_earlier_process_is_continued_within_the_limit(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("e" * 80)
    file = open_log(tmp_path)
    write(file, "f" * 60)
    assert texts(tmp_path) == {"x.log": "f" * 60, "x.log.1": "e" * 80}
    file.close()


@pytest.mark.parametrize("act", [os.unlink, lambda path: os.rename(path, f"{path}.moved")])
def test_file_that_others_move_or_remove_is_opened_again(tmp_path: Path, act: object) -> None:
    file = open_log(tmp_path)
    write(file, "before")
    assert callable(act)
    act(tmp_path / "x.log")
    write(file, "after")
    assert (tmp_path / "x.log").read_text() == "after"
    file.close()


def test_folder_that_comes_back_is_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    file = open_log(folder)
    with pytest.raises(FileNotFoundError):
        write(file, "lost")
    folder.mkdir()
    write(file, "kept")
    assert texts(folder) == {"x.log": "kept"}
    file.close()


CRASHES = """
import ctypes, os, sys
from pathlib import Path
from pdserve.observe.log_sinks import RotatingFile
file = RotatingFile(Path(sys.argv[1]), max_bytes=100, num_files=2, is_stderr=True)
for letter in "abc":
    file.write(memoryview(letter.encode() * 60))
os.write(2, b"x" * 200)  # as C libraries do
file.tidy()
os.write(2, b"last words")
ctypes.string_at(0)
"""


def test_what_a_dying_process_prints_is_in_its_file_which_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", CRASHES, str(path)], capture_output=True
    )
    assert done.returncode < 0
    assert done.stderr == b""
    assert path.read_text().startswith("last wordsFatal Python error: Segmentation fault")
    assert path.with_name("x.log.1").read_text() == "c" * 60 + "x" * 200
    assert len(list(tmp_path.iterdir())) == 2


def test_pipe_that_nobody_reads_takes_nothing_and_blocks_nobody() -> None:
    reading, writing = os.pipe()
    theirs = os.dup(writing)  # a shell's, which must not be changed
    reopen_without_blocking(writing)
    sink = DescriptorSink(writing)
    started_s = time.monotonic()
    while sink.write(memoryview(b"x" * 4096)):
        pass
    assert time.monotonic() - started_s < 5.0
    assert os.get_blocking(theirs)
    os.read(reading, 1 << 20)
    assert sink.write(memoryview(b"x" * 4096)) == 4096
    for descriptor in (reading, writing, theirs):
        os.close(descriptor)


def test_pipe_whose_reader_has_gone_is_an_error_at_once() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    reopen_without_blocking(writing)
    with pytest.raises(BrokenPipeError):
        DescriptorSink(writing).write(memoryview(b"x"))
    os.close(writing)


def test_file_is_left_as_it_was_opened(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"abc")
    reopen_without_blocking(descriptor)
    DescriptorSink(descriptor).write(memoryview(b"def"))
    os.close(descriptor)
    assert (tmp_path / "out").read_text() == "abcdef"


def test_rotated_names_are_newest_first() -> None:
    names = [path.name for path in rotated_paths(Path("/logs/router.log"), 3)]
    assert names == ["router.log", "router.log.1", "router.log.2"]
