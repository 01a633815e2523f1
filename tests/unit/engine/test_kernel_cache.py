"""Compiled functions are kept where only the user can write, and no state of the disk is fatal."""

import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pdserve.engine.kernel_cache import cache_folder, stamp_of

PROGRAM = """
import resource, sys
import numba
from pdserve.engine.kernel_cache import use_cache

def double(number):
    return 2 * number

stamp, max_file_bytes = sys.argv[1:]
if max_file_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(max_file_bytes),) * 2)
dispatcher = use_cache(numba.njit(double), stamp)
if dispatcher(4) != 8:
    raise SystemExit("wrong")
print(sum(dispatcher.stats.cache_hits.values()))
"""


def start(folder: Path, stamp: str = "a", max_file_bytes: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, stamp, max_file_bytes],
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: "subprocess.Popen[str]") -> tuple[bool, list[str]]:
    """Whether the function came from the disk, and what was said."""
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stdout.strip() == "1", stderr.splitlines()


def run(folder: Path, stamp: str = "a", max_file_bytes: str = "") -> tuple[bool, list[str]]:
    return end(start(folder, stamp, max_file_bytes))


def kept(folder: Path) -> Sequence[Path]:
    return sorted((folder / "pdserve").iterdir())


def test_next_process_takes_what_one_compiled_and_another_source_is_another_entry(
    tmp_path: Path,
) -> None:
    assert run(tmp_path) == (False, [])
    assert run(tmp_path) == (True, [])
    assert run(tmp_path, stamp="b") == (False, [])
    assert len(kept(tmp_path)) == 2
    assert stat.S_IMODE((tmp_path / "pdserve").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept(tmp_path)} == {0o600}


class Touch:
    """A pickle that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("damage", ["empty", "torn", "another", "flipped"])
def test_damaged_file_is_compiled_again_with_one_line(tmp_path: Path, damage: str) -> None:
    run(tmp_path)
    (path,) = kept(tmp_path)
    data = path.read_bytes()
    trap = tmp_path / "trap"
    path.write_bytes(
        {
            "empty": b"",
            "torn": data[:100],
            "another": data[:32] + pickle.dumps(Touch(trap)),
            "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        }[damage]
    )
    is_hit, said = run(tmp_path)
    assert not is_hit
    assert len(said) == 1
    assert said[0].startswith("kernel_cache.damaged")
    assert str(tmp_path) in said[0]
    assert not trap.exists()
    assert run(tmp_path) == (True, [])


def test_folder_that_others_can_write_to_is_not_read(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "pdserve").chmod(0o777)
    is_hit, said = run(tmp_path)
    assert not is_hit
    assert "can be written by others" in said[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_not_read(tmp_path: Path) -> None:
    run(tmp_path)
    os.chown(tmp_path / "pdserve", 12345, 12345)
    is_hit, said = run(tmp_path)
    assert not is_hit
    assert "belongs to another user" in said[0]


def test_link_to_a_folder_of_anybody_is_not_followed(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "pdserve").rename(tmp_path / "elsewhere")
    (tmp_path / "pdserve").symlink_to(tmp_path / "elsewhere")
    assert run(tmp_path)[0] is False


def test_file_in_the_folders_place_costs_only_the_time_to_compile(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    is_hit, said = run(path)
    assert not is_hit
    assert str(path) in said[0]


def test_full_disk_costs_only_the_time_to_compile_and_leaves_nothing(tmp_path: Path) -> None:
    is_hit, said = run(tmp_path, max_file_bytes="1000")
    assert not is_hit
    assert len(said) == 1
    assert "kernel_cache.unwritable" in said[0]
    assert kept(tmp_path) == []


def test_processes_that_compile_side_by_side_leave_one_whole_file(tmp_path: Path) -> None:
    both = [start(tmp_path), start(tmp_path)]
    assert [end(each)[1] for each in both] == [[], []]
    assert len(kept(tmp_path)) == 1
    assert run(tmp_path) == (True, [])


def test_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pdserve" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "pdserve" / "kernels"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    assert cache_folder() == tmp_path / "numba" / "pdserve"


def test_stamp_follows_the_content_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text("STEP = 1\n")
    before = stamp_of(tmp_path.glob("*.py"))
    assert before == stamp_of(tmp_path.glob("*.py"))
    (tmp_path / "kernel.py").write_text("STEP = 2\n")
    assert stamp_of(tmp_path.glob("*.py")) != before
