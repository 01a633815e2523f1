"""An engine of rank processes: a cancelled step, and errors on any rank, end as they must."""

import subprocess
import sys

import pytest

WITHIN_S = 300


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.toy_rank", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)


def test_cancelled_step_is_over_on_every_rank_before_it_raises() -> None:
    whole, cancelled = run("steps", 2, 2), run("cancel", 2, 2)
    assert (whole.returncode, cancelled.returncode) == (0, 0), whole.stderr + cancelled.stderr
    _, second = whole.stdout.split("\n", 1)
    assert cancelled.stdout == f"cancelled\n{second}"


@pytest.mark.parametrize("rank", [0, 1])
def test_error_in_a_step_ends_the_worker_and_names_the_rank(rank: int) -> None:
    done = run("steps", 2, 1, rank)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1  # the step before gave its token
    last = done.stderr.splitlines()[-1]
    assert f"rank {rank} failed: ValueError in a step" in last


def test_rank_that_cannot_load_is_a_clear_error_and_no_crash() -> None:
    done = run("load", 2, 1, 1)
    assert (done.returncode, done.stdout) == (0, "rank 1: the disk is full of holes\n"), done.stderr
